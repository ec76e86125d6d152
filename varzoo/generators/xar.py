"""xAR: next-X prediction by flow matching with noisy context learning (arXiv 2502.20388).

Official code: OliverRensu/xAR, with which forward, loss, gradients and sampling agree for X = cell. One transformer is
backbone and head: it gives the velocity of a whole noisy unit, conditioned on the units before it. Training shows it
every unit noisy, each at a time of its own; sampling shows it finished units at time 0. Where paper and code differ,
the code is followed. Kept although odd: timesteps are truncated, so time 1 (the first evaluation) is never trained and
time 0 (the context) hardly ever. Computed otherwise, with equal results: the null branch runs only where guidance acts,
and the modulation of several solver steps is one product.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.losses import Losses, weigh
from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.unitwise import UnitDecoding, UnitGenerator
from varzoo.nn.denoiser import FREQUENCIES, MODULATION_NUMBERS, time_frequencies
from varzoo.nn.initial import xavier_linear
from varzoo.nn.modulated_transformer import time_index
from varzoo.predictions.flow import FlowPrediction


class XAR(UnitGenerator):
    """A transformer that carries one unit of continuous tokens after the other from noise to data.

    Args:
        spec, unit, width and the rest: see `UnitGenerator`. Any kind of unit will do; cells are what was published.
    """

    goldens: ClassVar[tuple[str, ...]] = ("xar/*",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        width = self.class_embed.embedding_dim
        self.time_embed = TimestepEmbedding(FREQUENCIES, width)
        self.head = nn.Linear(width, self.spec.size)
        xavier_linear([*self.time_embed.modules(), *self.head.modules()])

    def time_vectors(self, times: Tensor) -> Tensor:
        """Times `[...]` in [0, 1] -> vectors `[..., width]`."""
        frequencies = time_frequencies(time_index(times).flatten().to(self.head.weight.device))
        return self.time_embed(frequencies.to(self.head.weight.dtype)).unflatten(0, times.shape)

    def velocity(self, sequence: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
        """Velocities `[B, S, C]` of all units at once, each seeing itself and those before it.

        Args:
            sequence: `[B, S, C]`, unit after unit.
            times: `[B, U]` of every unit.
            vectors: class vectors `[B, width]`.
        """
        modulations = self.backbone.modulations(vectors[:, None] + self.time_vectors(times))
        hidden = self.backbone(self.backbone.token_embed(sequence), modulations, groups=self.turn, mask=self.visible)
        return self.head(hidden)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Mean squared error of the velocity; the times of units are logit-normal, each its own."""
        self.check_condition(batch.condition)
        clean = self.layout.split(batch.tokens)
        times = torch.sigmoid(draws.normal("time", (len(self.layout.sizes),), dtype=torch.float64)).float()
        noise = self.noise_like(clean, draws)
        at = times[:, self.turn, None]
        vectors = self.class_vectors(batch.condition, draws.uniform("drop_label") < self.class_drop)
        velocity = self.velocity((1 - at) * clean + at * noise, times, vectors)
        return weigh({"velocity": (velocity - (noise - clean)).square().mean(dim=(1, 2))}, batch.weights)

    def open(self, condition: Condition, guidance: Schedule | None) -> XARDecoding:
        return XARDecoding(self, condition, guidance)

    def key_maps(self) -> dict[str, KeyMap]:
        names = {
            "time_embed.mlp.0.{p}": "time_embed.linear_1.{p}",
            "time_embed.mlp.2.{p}": "time_embed.linear_2.{p}",
            "pred.{p}": "head.{p}",
        }
        blocks = [f"{stack}_blocks.{i}" for stack, depth in (("encoder", len(self.backbone.encoder_blocks)),
                                                             ("decoder", len(self.backbone.decoder_blocks)))
                  for i in range(depth)]
        tables = [Ignore(f"{block}.attn.rope.freqs_{name}", partial(self._doubled_table, part))
                  for block in blocks for part, name in enumerate(("cos", "sin"))]
        return {"xar": KeyMap([*(Rename(*pair) for pair in names.items()), *tables, *self.key_rules()])}

    def _doubled_table(self, part: int) -> Tensor:
        """Cosines (0) or sines (1) `[S, head_dim]` as official files keep them, once for either channel of a pair."""
        return self.backbone.rotary[..., part].repeat_interleave(2, dim=-1)


class XARDecoding(UnitDecoding):
    """Units that are finished, and the velocity of the next."""

    ahead = 0

    def __init__(self, generator: XAR, condition: Condition, guidance: Schedule | None) -> None:
        super().__init__(generator, condition, guidance)
        self._generator = generator

    def predict(self, step: Step) -> FlowPrediction:
        network_at = partial(UnitVelocity, self, self._generator, step.index)
        return FlowPrediction(network_at=network_at, scale=self.scale(step), positions=step.positions,
                              channels=self._generator.spec.size, backbone_evaluations=0)

    def modulations(self, times: Tensor, branches: int) -> list[Tensor]:
        """Time vectors `[K, width]` -> modulations of every block, `[K, branches B, 6 width]`."""
        return self._backbone.modulations(times[:, None] + self._vectors[:branches * self.batch])

    def velocity(self, index: int, x: Tensor, modulations: list[Tensor], branches: int) -> Tensor:
        """Velocities `[branches, B, n, C]` of unit `index` at x `[B, n, C]`; finished units not yet cached go along.

        Args:
            modulations: of every block at the time of x, `[branches B, 6 width]`.
        """
        generator, first = self._generator, self.first_to_feed(index, branches)
        fed, groups, modulations = x, None, [modulation[:, None] for modulation in modulations]
        if first < index:
            start, (stop, end) = self._bounds[first][0], self._bounds[index]
            fed = torch.cat([self._sequence[:, start:stop].to(x.dtype), x], dim=1)
            context = self.modulations(generator.time_vectors(torch.zeros(1)), branches)
            modulations = [torch.cat([at_zero[0][:, None], at_time], dim=1)
                           for at_zero, at_time in zip(context, modulations)]
            groups = (generator.turn[start:end] == index).long()
        embedded = self._backbone.token_embed(fed.to(generator.head.weight.dtype)).repeat(branches, 1, 1)
        hidden = self.run(embedded, modulations, first=first, index=index, branches=branches, groups=groups)
        return generator.head(hidden).unflatten(0, (branches, -1))


class UnitVelocity:
    """The velocity of one unit at times known in advance, as (x, k, branches) -> `[branches, B, n, C]`.

    adaLN depends on class and time alone, and holds a third of the weights: the modulations of as many solver steps as
    `MODULATION_NUMBERS` allows are made at once, for as many branches as the most that will be asked for.
    """

    def __init__(self, decoding: XARDecoding, generator: XAR, index: int, times: Tensor, branches: int) -> None:
        self.decoding, self.index, self.branches = decoding, index, branches
        self.times = generator.time_vectors(times)
        per_step = branches * decoding.batch * generator.backbone.modulation_numbers
        self.chunk = max(1, MODULATION_NUMBERS // per_step)
        self._first = -1
        self._modulations: list[Any] = []

    def __call__(self, x: Tensor, k: int, branches: int) -> Tensor:
        first = k - k % self.chunk
        if first != self._first:
            self._modulations = []  # freed before the next ones are made
            self._modulations = self.decoding.modulations(self.times[first:first + self.chunk], self.branches)
            self._first = first
        modulations = [modulation[k - first, :branches * len(x)] for modulation in self._modulations]
        return self.decoding.velocity(self.index, x, modulations, branches)
