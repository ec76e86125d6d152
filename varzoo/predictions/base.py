"""The contract of predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from varzoo.core.draws import AnyDraws


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens drawn from a prediction: `[B, n]` ids or `[B, n, C]` values, and the head evaluations that took."""

    tokens: Tensor
    evaluations: int = 0


class Prediction(ABC):
    """What is likely at the positions of one step, for the tokens known so far.

    Attributes:
        options: names of the keyword arguments that `draw` takes; a sampler refuses any other at composition.
        backbone_evaluations: runs of the backbone that the prediction took; none where the backbone itself is what
            `draw` evaluates (xAR).
        carry: whatever the decoding wants back on commit, opaque to the sampler.
    """

    options: ClassVar[frozenset[str]]
    backbone_evaluations: int = 1
    carry: Any = None

    @abstractmethod
    def draw(self, draws: AnyDraws, **options: Any) -> Drawn:
        """Draw tokens for every position. Draws are keyed by position, so a repeated call gives the same tokens."""
