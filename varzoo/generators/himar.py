"""Hi-MAR: masked autoregressive generation with low-resolution token pivots (arXiv 2505.20288).

One transformer draws in two phases: "pivot", the tokens of a smaller copy of the image, as MAR does; then "dense", the
image's tokens, from the hidden vectors that the pivots were drawn from, in few steps by a head that denoises the whole
map. Official code: HiDream-ai/himar, with which forward, loss, gradients and sampling agree; where the paper differs,
the code is followed. Its released training loop cannot run (the token head's loss reads a variable before it is set):
there MAR's is used. Kept although odd: the null branch of the dense phase sees class-conditional pivots; known tokens
are not restored after the last solver step; the loss of the dense phase is not divided by the share of masked tokens.
Computed otherwise, with equal results: heads and the decoder's end run where they are needed alone, no null branch at
scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.losses import Losses, weighted_mean
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Batch, Condition, Decoding
from varzoo.generators.mar import MaskedDiffusion
from varzoo.generators.masked import MaskPlan, MaskRate, known_positions, masked_steps, require_plan, split_order
from varzoo.nn.diffusion import epsilon_loss
from varzoo.nn.diffusion_mlp import DiffusionMLP, diffusion_mlp_rules
from varzoo.nn.diffusion_transformer import DiffusionTransformer, diffusion_transformer_rules
from varzoo.nn.initial import xavier_linear
from varzoo.nn.rows import put_rows, take_rows
from varzoo.nn.scale_aware_vit import ScaleAwareViT
from varzoo.nn.solvers import Known
from varzoo.predictions.base import Prediction
from varzoo.predictions.diffusion import DiffusionPrediction, MapDiffusionPrediction

PHASES = ("pivot", "dense")
PIVOT, DENSE = range(2)


class HiMAR(MaskedDiffusion):
    """A masked autoencoder transformer over pivots, then image tokens, with a diffusion head for each.

    Args:
        spec: continuous tokens of the image.
        pivot_shape: (h, w) of the pivots, which have as many channels.
        num_classes: class labels it knows.
        encoder_width, encoder_depth, encoder_heads: size of the encoder.
        decoder_width, decoder_depth, decoder_heads: size of the decoder.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        buffer_size: slots before the tokens that hold the class vector.
        norm_eps: of the transformer's LayerNorms; the published sizes have 1e-6.
        head_width, head_depth: size of the pivots' head, MAR's.
        map_head_width, map_head_depth, map_head_heads, map_head_mlp_ratio: size of the diffusion transformer.
        noise_schedule, noise_steps: the diffusion process of both heads, see `Diffusion.named`.
        head_batch: times and noises per masked pivot, and per map, in a training step (official: diffusion_batch_mul).
        pivot_mask_rate, dense_mask_rate: share of tokens that a training step masks.
        pivot_weight, dense_weight: of the two losses (official: 0.4 and 0.6).
        class_drop: probability that a sample is trained without its class, drawn for each phase.
        pivot_keep: probability that the dense phase is shown the pivots, in the end; the others are learned nulls.
        pivot_warmup: share of the training over which it rises from 0.
        attention_dropout: on attention weights.
        projection_dropout: after attention projections and inside the MLPs.
    """

    goldens: ClassVar[tuple[str, ...]] = ("himar/*",)
    predicts: ClassVar[Mapping[str, type[Prediction]]] = {
        "pivot": DiffusionPrediction, "dense": MapDiffusionPrediction}

    backbone: ScaleAwareViT

    def __init__(self, *, spec: TokenSpec, pivot_shape: Sequence[int], num_classes: int, encoder_width: int,
                 encoder_depth: int, encoder_heads: int, decoder_width: int, decoder_depth: int, decoder_heads: int,
                 mlp_ratio: float, buffer_size: int, norm_eps: float, head_width: int, head_depth: int,
                 map_head_width: int, map_head_depth: int, map_head_heads: int, map_head_mlp_ratio: float,
                 noise_schedule: str, noise_steps: int, head_batch: int, pivot_mask_rate: MaskRate,
                 dense_mask_rate: MaskRate, pivot_weight: float, dense_weight: float, class_drop: float,
                 pivot_keep: float, pivot_warmup: float, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__(spec=spec, num_classes=num_classes, width=encoder_width, noise_schedule=noise_schedule,
                         noise_steps=noise_steps, head_batch=head_batch, class_drop=class_drop)
        if len(spec.shape) != 2 or len(pivot_shape) != 2 or min(pivot_shape) < 1:
            raise ValueError(f"Hi-MAR needs two grids (h, w), got {spec.shape} and pivot_shape={tuple(pivot_shape)}.")
        if not 0 <= pivot_keep <= 1 or not 0 <= pivot_warmup <= 1:
            raise ValueError(f"need pivot_keep and pivot_warmup in [0, 1], got {pivot_keep} and {pivot_warmup}.")
        self.pivot_count = math.prod(pivot_shape)
        self.pivot_mask_rate, self.dense_mask_rate = pivot_mask_rate, dense_mask_rate
        self.pivot_weight, self.dense_weight = pivot_weight, dense_weight
        self.pivot_keep, self.pivot_warmup = pivot_keep, pivot_warmup
        self.backbone = ScaleAwareViT(
            phases=len(PHASES), length=self.pivot_count + spec.length, channels=spec.size,
            encoder_width=encoder_width, encoder_depth=encoder_depth, encoder_heads=encoder_heads,
            decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
            mlp_ratio=mlp_ratio, buffer_size=buffer_size, norm_eps=norm_eps,
            attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        self.pivot_embed = nn.Linear(spec.size, encoder_width)
        self.hidden_embed = nn.Linear(decoder_width, encoder_width)
        self.null_pivots = nn.Parameter(torch.empty(1, self.pivot_count, spec.size))
        xavier_linear((self.pivot_embed, self.hidden_embed))
        nn.init.normal_(self.null_pivots, std=0.02)
        self.pivot_head = DiffusionMLP(channels=spec.size, out_channels=2 * spec.size, condition_width=decoder_width,
                                       width=head_width, depth=head_depth)
        self.dense_head = DiffusionTransformer(
            grid=spec.grid, channels=spec.size, out_channels=spec.size, condition_width=decoder_width,
            width=map_head_width, depth=map_head_depth, heads=map_head_heads, mlp_ratio=map_head_mlp_ratio)

    def hidden_pivots(self, pivots: Tensor, visible: Tensor, vectors: Tensor, at: Tensor) -> Tensor:
        """The pivot phase: vectors `[B, n, decoder_width]` of the pivots at `[B, n]`.

        Args:
            pivots: `[B, S, C]`, of which the `visible` `[B, V]` are read.
            vectors: class vectors `[B, encoder_width]`.
        """
        stack = self.backbone.stack(PIVOT)
        rows = self.pivot_embed(take_rows(pivots, visible).to(vectors.dtype))
        return self.backbone.decode_rows(self.backbone.encode_rows(rows, visible, vectors, stack), visible, at, stack)

    def pivot_rows(self, hidden: Tensor, shown: Tensor) -> Tensor:
        """What the dense phase sees of the pivots, `[B, S, encoder_width]`.

        Args:
            hidden: their vectors `[B, S, decoder_width]`.
            shown: `[B, S]`, False where the learned null takes a pivot's place.
        """
        return torch.where(shown[..., None], self.hidden_embed(hidden), self.pivot_embed(self.null_pivots))

    def hidden_map(self, rows: Tensor, tokens: Tensor, visible: Tensor, vectors: Tensor) -> Tensor:
        """The dense phase: vectors `[B, N, decoder_width]` of the whole map.

        Args:
            rows: what `pivot_rows` gave.
            tokens: `[B, N, C]`, of which the `visible` `[B, V]` are read.
            vectors: class vectors `[B, encoder_width]`.
        """
        stack, (seen, encoded) = self.backbone.stack(DENSE), self.encode_map(rows, tokens, visible, vectors)
        everywhere = torch.arange(self.spec.length, device=visible.device).expand(len(visible), -1)
        return self.backbone.decode_rows(encoded, seen, everywhere + self.pivot_count, stack)

    def encode_map(self, rows: Tensor, tokens: Tensor, visible: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's part of `hidden_map`: positions in the whole sequence and the encoder's output."""
        pivots = torch.arange(self.pivot_count, device=visible.device).expand(len(visible), -1)
        seen = torch.cat([pivots, visible + self.pivot_count], dim=1)
        rows = torch.cat([rows, self.backbone.token_embed(take_rows(tokens, visible).to(vectors.dtype))], dim=1)
        return seen, self.backbone.encode_rows(rows, seen, vectors, self.backbone.stack(DENSE))

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """The weighted losses of both phases; `batch.extras["pivots"]` holds the pivots `[B, S, C]`.

        The shares of masked tokens are one draw each for the batch, the rest is drawn per sample. The dense phase gets
        its pivots' vectors from the pivot phase, without their gradient; those that were visible there are nulls.
        """
        self.check_condition(batch.condition)
        pivots = batch.extras.get("pivots")
        expected = (len(batch.tokens), self.pivot_count, self.spec.size)
        if pivots is None or pivots.shape != expected:
            raise ValueError(f"Hi-MAR trains on pivots {list(expected)} beside the tokens, got "
                             f"{None if pivots is None else list(pivots.shape)}; the data need a smaller copy of every "
                             "image, as in copies={pivots: [h, w]} (in pixels).")
        masked, visible = split_order(draws.permutation("pivot_order", self.pivot_count),
                                      self.pivot_mask_rate(draws, "pivot_mask_rate"))
        vectors = self.training_vectors(batch.condition, draws, "drop_pivot_label")
        hidden = self.hidden_pivots(pivots, visible, vectors, masked)
        error, bound = self.token_losses(self.pivot_head, pivots, masked, hidden, draws, "pivot_")
        pivot_loss = (error + bound).mean(dim=(0, 2))

        risen = 1.0 if self.pivot_warmup == 0 else min(1.0, progress / self.pivot_warmup)
        shown = draws.uniform("drop_pivots")[:, None] > 1 - self.pivot_keep * risen
        everything = hidden.new_zeros(len(hidden), self.pivot_count, hidden.shape[-1])
        rows = self.pivot_rows(put_rows(everything, masked, hidden.detach()),
                               shown & torch.zeros_like(everything[..., 0]).bool().scatter(1, masked, True))
        masked, visible = split_order(draws.permutation("dense_order", self.spec.length),
                                      self.dense_mask_rate(draws, "dense_mask_rate"))
        vectors = self.training_vectors(batch.condition, draws, "drop_dense_label")
        dense_loss = self._map_loss(batch.tokens, masked, self.hidden_map(rows, batch.tokens, visible, vectors), draws)
        return Losses(
            total=weighted_mean(self.pivot_weight * pivot_loss + self.dense_weight * dense_loss, batch.weights),
            parts={"pivot": pivot_loss.detach().mean(), "dense": dense_loss.detach().mean()})

    def _map_loss(self, tokens: Tensor, masked: Tensor, hidden: Tensor, draws: AnyDraws) -> Tensor:
        """The dense head's loss of every sample: squared error at the masked positions over the whole map's size."""
        repeats, size = range(self.head_batch), (self.spec.size,)
        everywhere = torch.arange(self.spec.length, device=tokens.device).expand(len(tokens), -1)
        index = torch.stack([draws.integers("dense_t", len(self.process), repeat=k) for k in repeats])
        noise = torch.stack([draws.normal("dense_noise", size, at=everywhere, repeat=k) for k in repeats])
        error = epsilon_loss(self.process, lambda noised, times: self.dense_head(noised, times, hidden),
                             tokens.expand_as(noise), index[..., None], noise)
        return error.gather(-1, masked.expand(self.head_batch, -1, -1)).sum(dim=-1).mean(dim=0) / self.spec.length

    @property
    def lengths(self) -> dict[str, int]:
        """How many tokens each phase draws."""
        return {"pivot": self.pivot_count, "dense": self.spec.length}

    def check_plan(self, plan: Any) -> None:
        for phase, length in self.lengths.items():
            require_plan(of_phase(plan, phase, PHASES), MaskPlan, f"Hi-MAR's {phase} phase", length)

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> HiMARDecoding:
        self.check_condition(condition)
        self.check_plan(plan)
        steps, scales = {}, {}
        for phase, length in self.lengths.items():
            phase_plan = of_phase(plan, phase, PHASES)
            order = draws.permutation(f"{phase}_order", length)
            steps[phase] = list(masked_steps(phase_plan, order, phase=phase))
            scales[phase] = of_phase(guidance, phase, PHASES)
            needs_null_branch(scales[phase], steps[phase])  # refuses what does not guide
        return HiMARDecoding(self, self.class_vectors(condition), chain(*steps.values()), scales)

    def key_maps(self) -> dict[str, KeyMap]:
        two = {"convert": lambda table: table.unflatten(1, (len(PHASES), -1))[0],  # the phases' tables in a row
               "revert": lambda table: table.flatten(0, 1)[None]}
        phases = {"convert": lambda table: table.flatten(1), "revert": lambda table: table[:, None, None]}
        names = {
            "cond_tokens": "null_pivots",
            "cond_proj.{p}": "pivot_embed.{p}",
            "cond_z_proj.{p}": "hidden_embed.{p}",
            **{f"{part}_task_emb.weight": f"backbone.{part}_phases.embed.weight" for part in ("encoder", "decoder")},
            **{f"{part}_blocks_ada.1.{{p}}": f"backbone.{part}_phases.linear.{{p}}" for part in ("encoder", "decoder")},
        }
        return {"himar": KeyMap([
            *(Rename(f"{part}_pos_embed_learned", f"backbone.{part}_positions", **two)
              for part in ("encoder", "decoder")),
            Rename("mask_token", "backbone.mask_token", **two),
            *(Rename(f"{part}_blocks.{{i}}.adaLN_{kind}", f"backbone.{part}_blocks.{{i}}.phase_{kind}", **phases)
              for part in ("encoder", "decoder") for kind in ("scale", "shift")),
            *(Rename(official, ours) for official, ours in names.items()),
            *self.common_rules(),
            *diffusion_mlp_rules("diffloss.net.", "pivot_head."),
            *diffusion_transformer_rules("cond_diffloss.net.", "dense_head.", self.spec.grid,
                                         self.dense_head.input.out_features),
        ])}


class HiMARDecoding(Decoding):
    """Known pivots and tokens, the pivots' vectors, and what is still to come.

    There is no cache, as in MAR's. A prediction of pivots carries their vectors, which are kept on commit; a pivot that
    was never committed is the learned null in the dense phase.

    Attributes:
        pivots: `[B, S, C]` in raster order, zero where not drawn yet: a preview of the image at a smaller size.
        hidden: `[B, S, decoder_width]`, the vector that each pivot was drawn from.
    """

    def __init__(self, generator: HiMAR, vectors: Tensor, steps: Iterator[Step],
                 guidance: Mapping[str, Schedule | None]) -> None:
        self.generator, self.vectors, self.guidance = generator, vectors, guidance
        # float32 whatever the weights are: rounding latents would be seen in the pixels
        batch, device, spec = len(vectors), vectors.device, generator.spec
        self.tokens = torch.zeros(batch, spec.length, spec.size, device=device)
        self.pivots = torch.zeros(batch, generator.pivot_count, spec.size, device=device)
        width = generator.hidden_embed.in_features
        self.hidden = torch.zeros(batch, generator.pivot_count, width, dtype=vectors.dtype, device=device)
        self._known = {phase: torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
                       for phase, tokens in (("pivot", self.pivots), ("dense", self.tokens))}
        self._steps = steps

    @property
    def steps(self) -> Iterator[Step]:
        return self._steps

    def predict(self, step: Step) -> DiffusionPrediction:
        schedule, generator = self.guidance[step.phase], self.generator
        scale = 1.0 if schedule is None else schedule(step)
        vectors = self.vectors
        if scale != 1:  # the two branches as one doubled batch
            vectors = torch.cat([vectors, generator.null_class.expand_as(vectors)])
        branches = len(vectors) // len(self.vectors)
        known = self._known[step.phase].scatter(1, step.positions, False)
        visible = known_positions(known).repeat(branches, 1)
        shared: dict[str, Any] = {"scale": scale, "positions": step.positions, "process": generator.process,
                                  "phase": step.phase}
        if step.phase == "pivot":
            hidden = generator.hidden_pivots(self.pivots.repeat(branches, 1, 1), visible, vectors,
                                             step.positions.repeat(branches, 1)).unflatten(0, (branches, -1))
            return DiffusionPrediction(condition=hidden, network=generator.pivot_head, carry=hidden[0], **shared)
        rows = generator.pivot_rows(self.hidden, self._known["pivot"]).repeat(branches, 1, 1)
        hidden = generator.hidden_map(rows, self.tokens.repeat(branches, 1, 1), visible, vectors)
        return MapDiffusionPrediction(
            condition=hidden.unflatten(0, (branches, -1)), network=generator.dense_head, redraw=step.index,
            known=Known(mask=known[..., None], values=self.tokens), **shared)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        if step.phase == "pivot":
            if carry is None:
                raise ValueError("pivots are committed together with their prediction's carry, their hidden vectors.")
            self.pivots = put_rows(self.pivots, step.positions, tokens.to(self.pivots.dtype))
            self.hidden = put_rows(self.hidden, step.positions, carry.to(self.hidden.dtype))
        else:
            self.tokens = put_rows(self.tokens, step.positions, tokens.to(self.tokens.dtype))
        self._known[step.phase] = self._known[step.phase].scatter(1, step.positions, True)
