"""Positions that hold a stack of ids, drawn one level after the other by a network of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.nn.kv_cache import KVCache
from varzoo.predictions.base import Drawn, Prediction
from varzoo.predictions.categorical import Categorical

Setting = TypeVar("Setting", int, float)


class LevelNetwork(Protocol):
    """What predicts the next id of a stack."""

    levels: int

    def new_level_cache(self, batch: int) -> KVCache:
        """An empty cache of all levels, for `batch` stacks."""

    def next_logits(self, context: Tensor, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits `[B, n, V]` of level d, given contexts `[B, n, width]` and the ids `[B, n, d]` of the levels before.

        The cache holds what calls for the levels before have fed, and takes what this one feeds.
        """


@dataclass(frozen=True, kw_only=True)
class DepthPrediction(Prediction):
    """Stacks of ids `[B, n, D]` at raster positions `[B, n]`, each level given those before (RQ-Transformer's head).

    Attributes:
        context: `[B, n, width]`, what the backbone says of the positions.
        positions: which positions are drawn.
        network: what predicts a level.
    """

    context: Tensor
    positions: Tensor
    network: LevelNetwork

    options: ClassVar[frozenset[str]] = frozenset({"temperature", "top_k", "top_p", "filters"})

    def draw(self, draws: AnyDraws, *, temperature: float = 1.0, top_k: int | Sequence[int] = 0,
             top_p: float | Sequence[float] = 1.0,
             filters: tuple[str, ...] = ("top_k", "top_p_strict")) -> Drawn:
        """Draw ids `[B, n, D]`; temperature 0 takes the likeliest at every level.

        Args:
            draws: one row per sample.
            temperature: of all levels.
            top_k, top_p: limits of all levels, or one for each.
            filters: which filters act, and in what order; officially top-p drops an id at mass before >= p.
        """
        levels = self.network.levels
        tops = list(zip(per_level("top_k", top_k, levels), per_level("top_p", top_p, levels)))
        batch, count = self.positions.shape
        ids = self.positions.new_empty(batch, count, 0)
        cache = self.network.new_level_cache(batch * count)
        for level, (k, p) in enumerate(tops):
            logits = self.network.next_logits(self.context, ids, cache)
            if temperature == 0:
                drawn = logits.argmax(dim=-1)
            else:
                kept = Categorical(logits=logits, positions=self.positions).filtered(
                    temperature=temperature, top_k=k, top_p=p, filters=filters)
                uniforms = draws.uniform("token", at=self.positions, level=level)
                drawn = inverse_cdf(kept.softmax(dim=-1), uniforms)
            ids = torch.cat([ids, drawn[..., None]], dim=-1)
        return Drawn(tokens=ids, evaluations=levels)


def per_level(name: str, setting: Setting | Sequence[Setting], levels: int) -> list[Setting]:
    """A setting of every level. Raises ValueError if it is a list of another length."""
    if not isinstance(setting, Sequence):
        return [setting] * levels
    if len(setting) != levels:
        raise ValueError(f"{name} must be one value, or one for each of the {levels} levels; got {list(setting)}.")
    return list(setting)
