"""FlowAR: scale-wise autoregression with a flow-matching head (arXiv 2412.15205).

Official code: the FlowAR in Qinyu-Allen-Zhao/DiSA (the authors' own repository holds none), with which forward, loss
and sampling agree. The latent grid is drawn as a pyramid, each scale from a larger version of the one before: a
transformer that is causal over scales turns that input into a condition per token, and a small flow transformer draws
the scale from it. Training feeds the true coarser scale. Where paper and code differ, the code is followed. Computed
otherwise, with equal results: the null branch runs only where guidance acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.losses import Losses, weigh
from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.units import Scales, to_map, to_tokens
from varzoo.generators.unitwise import UnitDecoding, UnitGenerator
from varzoo.nn.flow_transformer import FlowTransformer, flow_transformer_rules
from varzoo.nn.rotary import axial_rows
from varzoo.predictions.flow import FlowPrediction, Network


class FlowAR(UnitGenerator):
    """A transformer over the scales of a grid, and a flow head that draws one.

    Args:
        scales: side (or (h, w)) of each scale, from 1 to the grid's.
        head_width, head_depth, head_heads: size of the flow head, which has no dropout.
        head_block: "plain" or "cross", see `varzoo.nn.flow_transformer`.
        settings: see `UnitGenerator`.
    """

    goldens: ClassVar[tuple[str, ...]] = ("flowar/*",)
    head_rotary: Tensor

    def __init__(self, *, scales: Sequence[int | Sequence[int]], head_width: int, head_depth: int, head_heads: int,
                 head_block: str, **settings: Any) -> None:
        super().__init__(unit=Scales(sides=scales), **settings)
        if self.layout.sizes[0] != 1:
            raise ValueError(f"FlowAR's first scale is 1 x 1, where the class stands, got {self.layout.sides[0]}.")
        width = self.class_embed.embedding_dim
        self.output_positions = nn.Parameter(torch.empty(1, len(self.layout.positions), width))
        nn.init.normal_(self.output_positions, std=0.02)
        self.head = FlowTransformer(channels=self.spec.size, condition_width=width, width=head_width, depth=head_depth,
                                    heads=head_heads, block=head_block)
        self.register_buffer("head_rotary", axial_rows(self.layout.coordinates, self.head.head_dim), persistent=False)

    def next_input(self, tokens: Tensor, index: int) -> Tensor:
        """The input `[B, n, C]` of scale `index` from the tokens `[B, m, C]` of the scale before it."""
        sides, full = self.layout.sides, self.spec.shape
        large = F.interpolate(to_map(tokens, sides[index - 1]), full, mode="bicubic", align_corners=False)
        return to_tokens(F.interpolate(large, sides[index], mode="area"))

    def inputs(self, pyramid: Tensor) -> Tensor:
        """Teacher-forced inputs `[B, S - 1, C]` of all scales but the first, from the true scales `[B, S, C]`."""
        bounds = self.layout.bounds
        return torch.cat([self.next_input(pyramid[:, slice(*bounds[index])], index + 1)
                          for index in range(len(bounds) - 1)], dim=1)

    def conditions(self, inputs: Tensor, vectors: Tensor) -> Tensor:
        """Conditions `[B, S, width]` of all tokens of all scales, given teacher-forced inputs and class vectors."""
        embedded = torch.cat([vectors[:, None], self.backbone.token_embed(inputs)], dim=1)
        modulations = self.backbone.modulations(vectors[:, None])
        return self.backbone(embedded, modulations, mask=self.visible) + self.output_positions

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Mean squared error of the velocity, a scale weighted by its share of the grid's tokens."""
        self.check_condition(batch.condition)
        clean = self.layout.split(batch.tokens)
        times = draws.uniform("time", (len(self.layout.sizes),))
        noise = self.noise_like(clean, draws)
        vectors = self.class_vectors(batch.condition, draws.uniform("drop_label") < self.class_drop)
        conditions = self.conditions(self.inputs(clean), vectors)
        error = clean.new_zeros(len(clean))
        for index, (start, stop) in enumerate(self.layout.bounds):
            at, time = slice(start, stop), times[:, index]
            noised = torch.lerp(clean[:, at], noise[:, at], time[:, None, None])
            prepared = self.head.prepare(conditions[:, at], self.head_rotary[at])
            velocity = self.head(noised, self.head.time_vectors(time), prepared)
            squared = (velocity - (noise[:, at] - clean[:, at])).square().mean(dim=(1, 2))
            error = error + (stop - start) / self.spec.length * squared
        return weigh({"velocity": error}, batch.weights)

    def open(self, condition: Condition, guidance: Schedule | None) -> FlowARDecoding:
        return FlowARDecoding(self, condition, guidance)

    def key_maps(self) -> dict[str, KeyMap]:
        return {"flowar": KeyMap([Rename("diffusion_pos_embed_learned", "output_positions"), *self.key_rules(),
                                  *flow_transformer_rules(self.head, "flownet.", "head.")])}


class FlowARDecoding(UnitDecoding):
    """Scales that are drawn, and the conditions of the next.

    A step draws one scale. `Step.positions` count through the whole pyramid, coarse to fine; only those of the last
    scale are tokens, so `tokens` is zero until it is committed.
    """

    ahead = 1

    def __init__(self, generator: FlowAR, condition: Condition, guidance: Schedule | None) -> None:
        super().__init__(generator, condition, guidance)
        self._generator = generator
        self._modulations = self._backbone.modulations(self._vectors[:, None])

    def predict(self, step: Step) -> FlowPrediction:
        generator, scale = self._generator, self.scale(step)
        branches = 1 if scale == 1 else 2
        first, rows = self.first_to_feed(step.index, branches), branches * self.batch
        embedded = torch.cat([self._embedded(index, branches) for index in range(first, step.index + 1)], dim=1)
        hidden = self.run(embedded, [modulation[:rows] for modulation in self._modulations], first=first,
                          index=step.index, branches=branches)
        at = slice(*self._bounds[step.index])
        prepared = generator.head.prepare(hidden + generator.output_positions[:, at], generator.head_rotary[at])

        def network_at(times: Tensor, most: int) -> Network:
            vectors = generator.head.time_vectors(times)

            def network(x: Tensor, k: int, branches: int) -> Tensor:
                x = x.to(vectors.dtype).repeat(branches, 1, 1)
                velocity = generator.head(x, vectors[k:k + 1], prepared.first(len(x)))
                return velocity.unflatten(0, (branches, -1))

            return network

        return FlowPrediction(network_at=network_at, scale=scale, positions=step.positions,
                              channels=generator.spec.size, backbone_evaluations=1)

    def _embedded(self, index: int, branches: int) -> Tensor:
        """What is fed of a scale, `[branches B, n, width]`: the class, then the scale before, enlarged."""
        if index == 0:
            return self._vectors[:branches * self.batch, None]
        before = self._sequence[:, slice(*self._bounds[index - 1])]
        inputs = self._generator.next_input(before, index).to(self._vectors.dtype)
        return self._backbone.token_embed(inputs).repeat(branches, 1, 1)
