"""Guidance of a velocity or another estimate by its null branch, for decoders that are guided on every solver step.

A `Guidance` is configuration; `begin()` opens the state of one batch (momenta), which belongs to whoever is solving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Guide = Callable[[Tensor, Tensor, float], Tensor]
Scale = float | Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class LinearInTime:
    """A scale that depends on the flow's time: `data` at time 0, `noise` at time 1."""

    data: float
    noise: float

    def __call__(self, time: float) -> float:
        return self.data + (self.noise - self.data) * time


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """Base of the ways to guide.

    Args:
        scale: a number, or a function of the time (1 is noise). The number 1 needs no null branch; a function always
            has one.
    """

    scale: Scale

    def __post_init__(self) -> None:
        if not callable(self.scale) and self.scale < 1:
            raise ValueError(f"guidance scale {self.scale:g} is below 1; use 1 for no guidance, more than 1 to guide.")

    @property
    def needs_null(self) -> bool:
        return callable(self.scale) or self.scale != 1

    def at(self, time: float) -> float:
        return self.scale(time) if callable(self.scale) else self.scale

    @abstractmethod
    def begin(self) -> Guide:
        """A function of (conditional, null, time), both `[B, ...]`, to be called from noise to data for one batch."""


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    """null + scale (conditional - null) (arXiv 2207.12598)."""

    def begin(self) -> Guide:
        return lambda conditional, null, time: null + self.at(time) * (conditional - null)


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjected(Guidance):
    """Adaptive projected guidance (arXiv 2410.02416): the part of the difference along the conditional is weakened.

    Args:
        scale: see `Guidance`.
        momentum: of the difference over the solver steps, per sample; negative values push away from the past.
        parallel: share that is kept of the part parallel to the conditional estimate.
        threshold: largest norm of a sample's difference; 0 does not limit it. The momentum is kept unlimited.
    """

    momentum: float = -0.5
    parallel: float = 0.0
    threshold: float = 2.5

    def begin(self) -> Guide:
        running: Tensor | None = None

        def guide(conditional: Tensor, null: Tensor, time: float) -> Tensor:
            nonlocal running
            difference = conditional - null
            running = difference if running is None else difference + self.momentum * running
            difference, direction = running.flatten(1).double(), conditional.flatten(1).double()
            if self.threshold:
                length = difference.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                difference = difference * (self.threshold / length).clamp(max=1)
            direction = torch.nn.functional.normalize(direction, dim=1)
            along = (difference * direction).sum(dim=1, keepdim=True) * direction
            update = (difference - along + self.parallel * along).view_as(conditional).to(conditional.dtype)
            return conditional + (self.at(time) - 1) * update

        return guide
