"""A categorical distribution over token ids per position, with the filters of the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.core.errors import unknown
from varzoo.predictions.base import Drawn, Prediction


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Set all logits `[..., V]` below the k-th largest to -inf; ties with it are kept. k = 0 or k >= V keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -torch.inf)


def top_p_filter(logits: Tensor, p: float, *, strict: bool = False) -> Tensor:
    """Keep the smallest set of the likeliest ids whose mass exceeds p (the id that crosses p included), `[..., V]`.

    With `strict` the set is complete where its mass reaches p (RQ-Transformer).
    """
    if p >= 1:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    before = mass.roll(1, dims=-1)  # the mass of the ids before; the first id is always kept
    removed = before >= p if strict else before > p
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, ids, removed), -torch.inf)


FILTERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "top_k": top_k_filter, "top_p": top_p_filter, "top_p_strict": partial(top_p_filter, strict=True)}


def filtered(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             filters: tuple[str, ...] = ("top_k", "top_p")) -> Tensor:
    """Logits `[..., V]` after the temperature, then the filters in the order given, -inf where removed; float32."""
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got temperature={temperature}, "
                         f"top_k={top_k}, top_p={top_p}.")
    logits, limits = logits.float(), {"top_k": top_k, "top_p": top_p, "top_p_strict": top_p}
    if temperature != 1:
        logits = logits / max(temperature, 1e-5)
    for name in filters:
        if name not in FILTERS:
            raise unknown("filter", name, FILTERS)
        logits = FILTERS[name](logits, limits[name])
    return logits


@dataclass(frozen=True, kw_only=True)
class Categorical(Prediction):
    """Guided logits `[B, n, V]` of the ids at raster positions `[B, n]`.

    Where a position holds several ids, independent of each other, logits are `[B, n, D, V]`. Where positions are drawn
    more than once, `redraw` numbers the time, and every time has draws of its own.
    """

    logits: Tensor
    positions: Tensor
    redraw: int | None = None
    carry: Any = None

    options: ClassVar[frozenset[str]] = frozenset({"temperature", "top_k", "top_p", "filters"})

    def filtered(self, **options: Any) -> Tensor:
        """The logits `[B, n, (D,) V]` after temperature and filters, see `filtered`."""
        return filtered(self.logits, **options)

    def draw(self, draws: AnyDraws, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             filters: tuple[str, ...] = ("top_k", "top_p")) -> Drawn:
        """Draw ids `[B, n]` or `[B, n, D]`; temperature 0 takes the likeliest."""
        if temperature == 0:
            return Drawn(tokens=self.logits.argmax(dim=-1))
        logits = self.filtered(temperature=temperature, top_k=top_k, top_p=top_p, filters=filters)
        keys: dict[str, Any] = {} if self.redraw is None else {"redraw": self.redraw}
        uniforms = draws.uniform("token", tuple(logits.shape[2:-1]), at=self.positions, **keys)
        return Drawn(tokens=inverse_cdf(logits.softmax(dim=-1), uniforms))
