"""MAR: masked autoregressive generation of continuous tokens with a diffusion loss (arXiv 2406.11838).

Official code: LTH14/mar, with which forward, loss, gradients and sampling agree. Where paper and code differ, the code
is followed. Two quirks change published numbers and are kept: linear guidance stops short of its scale at the last step
(see `masked_steps`), and the variational term of the loss treats latents as 8-bit pixels (see `hybrid_loss`). Computed
otherwise, with equal results: training evaluates the head on masked positions only, and the null branch runs at guided
steps only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap, Rename, Rule
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Batch, Condition, Decoding, Generator
from varzoo.generators.masked import (
    TruncatedNormalRate,
    known_positions,
    masked_steps,
    require_plan,
    split_order,
)
from varzoo.nn.diffusion import Diffusion, hybrid_loss
from varzoo.nn.diffusion_mlp import DiffusionMLP, diffusion_mlp_rules
from varzoo.nn.masked_vit import MaskedViT, put_rows, take_rows
from varzoo.predictions.base import Prediction
from varzoo.predictions.diffusion import DiffusionPrediction


class MaskedDiffusion(Generator):
    """What MAR and its kin share: class vectors, the loss of the token-wise head, official names, what decays.

    Args:
        spec: continuous tokens; `spec.size` counts a token's channels, those of its patch included.
        num_classes: class labels it knows.
        width: of the class vectors.
        noise_schedule, noise_steps: the diffusion process, see `Diffusion.named`.
        head_batch: times and noises per masked token and training step (official: diffusion_batch_mul).
        class_drop: probability that a sample is trained without its class.
    """

    def __init__(self, *, spec: TokenSpec, num_classes: int, width: int, noise_schedule: str, noise_steps: int,
                 head_batch: int, class_drop: float) -> None:
        super().__init__()
        if spec.kind != "continuous":
            raise ValueError(f"{type(self).__name__} models continuous tokens, got a spec of {spec}. Choose a "
                             "tokenizer without a codebook, such as kl16.")
        if not 0 <= class_drop <= 1 or head_batch < 1:
            raise ValueError(f"need 0 <= class_drop <= 1 and head_batch >= 1, got {class_drop} and {head_batch}.")
        self.spec, self.num_classes, self.head_batch, self.class_drop = spec, num_classes, head_batch, class_drop
        self.class_embed = nn.Embedding(num_classes, width)
        self.null_class = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.null_class, std=0.02)
        self.process = Diffusion.named(noise_schedule, noise_steps)

    def class_vectors(self, condition: Condition) -> Tensor:
        """Class vectors `[B, width]`; the null class where there are no labels."""
        if condition.labels is None:
            return self.null_class.expand(condition.size, -1)
        return self.class_embed(condition.labels)

    def training_vectors(self, condition: Condition, draws: AnyDraws, name: str) -> Tensor:
        """Class vectors, some of them dropped."""
        dropped = draws.uniform(name) < self.class_drop
        return torch.where(dropped[:, None], self.null_class, self.class_vectors(condition))

    def token_losses(self, head: DiffusionMLP, tokens: Tensor, at: Tensor, condition: Tensor, draws: AnyDraws,
                     stream: str = "") -> tuple[Tensor, Tensor]:
        """Squared error and variational bound, each `[head_batch, B, n]`, of tokens `[B, N, C]` at positions `[B, n]`.

        Args:
            condition: `[B, n, D]`.
            stream: what the names of the draws begin with.
        """
        size, repeats = (tokens.shape[-1],), range(self.head_batch)
        index = torch.stack([draws.integers(f"{stream}t", len(self.process), at=at, repeat=k) for k in repeats])
        noise = torch.stack([draws.normal(f"{stream}noise", size, at=at, repeat=k) for k in repeats])
        return hybrid_loss(self.process, lambda noised, times: head(noised, times, condition),
                           take_rows(tokens, at).expand_as(noise), index, noise)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """As officially: neither heads nor biases and other vectors; tables and mask tokens decay."""
        return parameter.ndim >= 2 and "head." not in name

    def common_rules(self) -> list[Rule]:
        """Key map rules of what is not a head."""
        names = {
            "fake_latent": "null_class",
            "class_emb.weight": "class_embed.weight",
            "z_proj.{p}": "backbone.token_embed.{p}",
            "z_proj_ln.{p}": "backbone.token_norm.{p}",
            "encoder_pos_embed_learned": "backbone.encoder_positions",
            "encoder_blocks.{rest*}": "backbone.encoder_blocks.{rest*}",
            "encoder_norm.{p}": "backbone.encoder_norm.{p}",
            "decoder_embed.{p}": "backbone.decoder_embed.{p}",
            "mask_token": "backbone.mask_token",
            "decoder_pos_embed_learned": "backbone.decoder_positions",
            "decoder_blocks.{rest*}": "backbone.decoder_blocks.{rest*}",
            "decoder_norm.{p}": "backbone.decoder_norm.{p}",
            "diffusion_pos_embed_learned": "backbone.output_positions",
        }
        return [Rename(official, ours) for official, ours in names.items()]


def weighted_mean(per_sample: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of losses `[B]`, weighted by `[B]` where weights are given."""
    return per_sample.mean() if weights is None else (per_sample * weights).sum() / weights.sum()


class MAR(MaskedDiffusion):
    """A masked autoencoder transformer with a diffusion head.

    Args:
        spec: continuous tokens; `spec.size` counts a token's channels, those of its patch included.
        num_classes: class labels it knows.
        encoder_width, encoder_depth, encoder_heads: size of the encoder.
        decoder_width, decoder_depth, decoder_heads: size of the decoder.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        buffer_size: slots before the tokens that hold the class vector.
        norm_eps: of the transformer's LayerNorms; the published sizes have 1e-6.
        head_width, head_depth: size of the diffusion head.
        noise_schedule, noise_steps: the diffusion process, see `Diffusion.named`.
        head_batch: times and noises per masked token and training step (official: diffusion_batch_mul).
        mask_ratio_min: least share of masked tokens in training.
        class_drop: probability that a sample is trained without its class.
        attention_dropout: on attention weights.
        projection_dropout: after attention projections and inside the MLPs.
    """

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": DiffusionPrediction}

    def __init__(self, *, spec: TokenSpec, num_classes: int, encoder_width: int, encoder_depth: int,
                 encoder_heads: int, decoder_width: int, decoder_depth: int, decoder_heads: int, mlp_ratio: float,
                 buffer_size: int, norm_eps: float, head_width: int, head_depth: int, noise_schedule: str,
                 noise_steps: int, head_batch: int, mask_ratio_min: float, class_drop: float,
                 attention_dropout: float, projection_dropout: float) -> None:
        super().__init__(spec=spec, num_classes=num_classes, width=encoder_width, noise_schedule=noise_schedule,
                         noise_steps=noise_steps, head_batch=head_batch, class_drop=class_drop)
        if not 0 < mask_ratio_min < 1:
            raise ValueError(f"need 0 < mask_ratio_min < 1, got {mask_ratio_min}.")
        self.mask_rate = TruncatedNormalRate(low=mask_ratio_min)
        self.backbone = MaskedViT(
            length=spec.length, channels=spec.size, encoder_width=encoder_width, encoder_depth=encoder_depth,
            encoder_heads=encoder_heads, decoder_width=decoder_width, decoder_depth=decoder_depth,
            decoder_heads=decoder_heads, mlp_ratio=mlp_ratio, buffer_size=buffer_size, norm_eps=norm_eps,
            attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        self.head = DiffusionMLP(channels=spec.size, out_channels=2 * spec.size, condition_width=decoder_width,
                                 width=head_width, depth=head_depth)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Diffusion loss at the masked positions.

        The share of masked tokens is one draw for the batch (truncated normal around 1), the rest is drawn per sample.
        """
        self.check_condition(batch.condition)
        order = draws.permutation("order", self.spec.length)
        masked, visible = split_order(order, self.mask_rate(draws, "mask_rate"))
        vectors = self.training_vectors(batch.condition, draws, "drop_label")
        condition = self.backbone(batch.tokens, visible, vectors, masked)
        squared_error, bound = self.token_losses(self.head, batch.tokens, masked, condition, draws)
        return Losses(total=weighted_mean((squared_error + bound).mean(dim=(0, 2)), batch.weights),
                      parts={"epsilon": squared_error.detach().mean(), "variational": bound.detach().mean()})

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> MARDecoding:
        self.check_condition(condition)
        plan = require_plan(plan, "MAR", self.spec.length)
        guidance = of_phase(guidance)
        steps = list(masked_steps(plan, draws.permutation("order", self.spec.length)))
        needs_null_branch(guidance, steps)  # refuses what does not guide
        return MARDecoding(self, self.class_vectors(condition), steps, guidance)

    def key_maps(self) -> dict[str, KeyMap]:
        return {"mar": KeyMap([*self.common_rules(), *diffusion_mlp_rules("diffloss.net.", "head.")])}


class MARDecoding(Decoding):
    """Known tokens and what is still to come.

    There is no cache: every prediction runs the transformer anew on what is known, without the positions asked for, so
    that a position may be predicted again after it was drawn.
    """

    def __init__(self, generator: MAR, vectors: Tensor, steps: list[Step], guidance: Schedule | None) -> None:
        spec = generator.spec
        self.generator, self.vectors, self.guidance = generator, vectors, guidance
        # float32 whatever the weights are: rounding latents would be seen in the pixels
        self.tokens = torch.zeros(len(vectors), spec.length, spec.size, device=vectors.device)
        self._known = torch.zeros(len(vectors), spec.length, dtype=torch.bool, device=vectors.device)
        self._steps = iter(steps)

    @property
    def steps(self) -> Iterator[Step]:
        return self._steps

    def predict(self, step: Step) -> DiffusionPrediction:
        scale = 1.0 if self.guidance is None else self.guidance(step)
        vectors = self.vectors
        if scale != 1:  # the two branches as one doubled batch
            vectors = torch.cat([vectors, self.generator.null_class.expand_as(vectors)])
        branches = len(vectors) // len(self.vectors)
        visible = known_positions(self._known.scatter(1, step.positions, False))
        rows = self.generator.backbone(self.tokens.repeat(branches, 1, 1), visible.repeat(branches, 1), vectors,
                                       step.positions.repeat(branches, 1))
        return DiffusionPrediction(condition=rows.unflatten(0, (branches, -1)), scale=scale, positions=step.positions,
                                   process=self.generator.process, network=self.generator.head)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        self.tokens = put_rows(self.tokens, step.positions, tokens.to(self.tokens.dtype))
        self._known = self._known.scatter(1, step.positions, True)
