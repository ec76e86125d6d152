"""Tokens of several ids, drawn one id after another by a small autoregressive head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.nn.channel_transformer import ChannelTransformer
from varzoo.predictions.base import Drawn, Prediction


@dataclass(frozen=True, kw_only=True)
class ChannelPrediction(Prediction):
    """Ids `[B, n, C]` at raster positions `[B, n]`.

    Attributes:
        features: `[B, n, D]`, guidance applied.
        positions: which positions are drawn.
        head: draws the channels.

    Ids are drawn by the Gumbel trick with noise keyed by position and by the channel's place in the head's order.
    """

    features: Tensor
    positions: Tensor
    head: ChannelTransformer

    options: ClassVar[frozenset[str]] = frozenset({"temperature"})

    def draw(self, draws: AnyDraws, *, temperature: float = 1.0) -> Drawn:
        """Draw every channel of every position; temperature 0 takes the likeliest."""
        ids = torch.stack([ids for _, ids in self.channels(draws, temperature=temperature)], dim=-1)
        return Drawn(tokens=ids[..., self.head.inverse], evaluations=self.head.channels)

    def channels(self, draws: AnyDraws, *, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits `[B, n, levels]` (before the temperature) and ids `[B, n]` of one channel after another."""
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature:g}.")
        head, shape, ids = self.head, self.positions.shape, None
        state = head.start(self.features.flatten(0, 1))
        for k in range(head.channels):
            logits = head.step(state, k, None if ids is None else ids.flatten()).unflatten(0, shape)
            scores = logits.float()
            if temperature > 0:
                scores = scores / temperature + draws.gumbel("token", (head.levels,), at=self.positions, channel=k)
            ids = scores.argmax(dim=-1)
            yield logits, ids
