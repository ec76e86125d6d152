"""MAR: masked autoregressive generation of continuous tokens with a diffusion loss (arXiv 2406.11838).

Official code: LTH14/mar, with which forward, loss, gradients and sampling agree. Where paper and code differ, the code
is followed. Two quirks change published numbers and are kept: linear guidance stops short of its scale at the last step
(see `masked_steps`), and the variational term of the loss treats latents as 8-bit pixels (see `hybrid_loss`). Computed
otherwise, with equal results: training evaluates the head on masked positions only, and the null branch runs at guided
steps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses, weighted_mean
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.masked import TruncatedNormalRate
from varzoo.generators.masked_transformer import MaskedDecoding, MaskedGenerator
from varzoo.nn.diffusion import Diffusion, hybrid_loss
from varzoo.nn.diffusion_mlp import DiffusionMLP, diffusion_mlp_rules
from varzoo.nn.masked_vit import MaskedViT
from varzoo.nn.rows import take_rows
from varzoo.predictions.base import Prediction
from varzoo.predictions.diffusion import DiffusionPrediction


class MaskedDiffusion(MaskedGenerator):
    """What MAR and its kin share: the loss of the token-wise head, what decays.

    Args:
        spec: continuous tokens; `spec.size` counts a token's channels, those of its patch included.
        noise_schedule, noise_steps: the diffusion process, see `Diffusion.named`.
        head_batch: times and noises per masked token and training step (official: diffusion_batch_mul).
        num_classes, width, class_drop: see MaskedGenerator.
    """

    def __init__(self, *, spec: TokenSpec, num_classes: int, width: int, noise_schedule: str, noise_steps: int,
                 head_batch: int, class_drop: float) -> None:
        super().__init__(spec=spec, num_classes=num_classes, width=width, class_drop=class_drop)
        if spec.kind != "continuous":
            raise ValueError(f"{type(self).__name__} models continuous tokens, got a spec of {spec}. Choose a "
                             "tokenizer without a codebook, such as kl16.")
        if head_batch < 1:
            raise ValueError(f"need head_batch >= 1, got {head_batch}.")
        self.head_batch = head_batch
        self.process = Diffusion.named(noise_schedule, noise_steps)

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

    goldens: ClassVar[tuple[str, ...]] = ("mar/mar_*", "mar/diff*", "mar/mask_schedule", "mar/vit_block")
    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": DiffusionPrediction}
    offers: ClassVar[frozenset[str]] = frozenset({"densities"})

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
        masked, condition = self.training_rows(batch.tokens, batch.condition, draws, self.mask_rate)
        squared_error, bound = self.token_losses(self.head, batch.tokens, masked, condition, draws)
        return Losses(total=weighted_mean((squared_error + bound).mean(dim=(0, 2)), batch.weights),
                      parts={"epsilon": squared_error.detach().mean(), "variational": bound.detach().mean()})

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> MARDecoding:
        steps, guidance = self.begun(condition, draws, guidance, plan)
        # float32 whatever the weights are: rounding latents would be seen in the pixels
        tokens = torch.zeros(condition.size, self.spec.length, self.spec.size, device=self.null_class.device)
        return MARDecoding(self, tokens, self.class_vectors(condition), steps, guidance)

    def key_maps(self) -> dict[str, KeyMap]:
        return {"mar": KeyMap([*self.common_rules(), *diffusion_mlp_rules("diffloss.net.", "head.")])}


class MARDecoding(MaskedDecoding):
    """Known tokens and what is still to come."""

    generator: MAR

    def predict(self, step: Step) -> DiffusionPrediction:
        rows, scale = self.rows(step)
        return DiffusionPrediction(condition=rows, scale=scale, positions=step.positions,
                                   process=self.generator.process, network=self.generator.head)
