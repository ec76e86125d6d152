"""The contract of predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.nn.solvers import Density


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens drawn from a prediction: `[B, n]` ids or `[B, n, C]` values, the head evaluations that took and, where
    the solver has one, the density `[B, n, C]` that they were drawn from.
    """

    tokens: Tensor
    evaluations: int = 0
    density: Density | None = None


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
    def draw(self, draws: AnyDraws, *arguments: Any, **options: Any) -> Drawn:
        """Draw tokens for every position, with the keyword arguments that `options` names alone.

        Draws are keyed by position, so a repeated call gives the same tokens.
        """
