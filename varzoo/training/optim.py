"""Optimiser parts that configs put together: parameter groups and learning-rate factors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, decays: Callable[[str, nn.Parameter], bool]) -> list[dict[str, Any]]:
    """Two groups for an optimizer: trainable parameters that decay, at the optimizer's own rate, and those that do not.

    Args:
        model: whose parameters.
        decays: whether a parameter of a given name decays, such as `Generator.decays`.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[bool(decays(name, parameter))].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


class LearningRate(ABC):
    """A factor of the learning rate as a function of the step; fractional steps count too (see LambdaLR)."""

    @abstractmethod
    def __call__(self, step: float) -> float: ...


@dataclass(frozen=True, kw_only=True)
class WarmupConstant(LearningRate):
    """Linear from 0 over `warmup` steps, then 1."""

    warmup: float

    def __call__(self, step: float) -> float:
        return step / self.warmup if step < self.warmup else 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(LearningRate):
    """Linear from 0 over `warmup` steps, then linear to 0 at step `total`."""

    warmup: float
    total: float

    def __post_init__(self) -> None:
        if self.total <= self.warmup:
            raise ValueError(f"the warm-up of {self.warmup:g} steps must end before the total of {self.total:g} steps.")

    def __call__(self, step: float) -> float:
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.total - step) / (self.total - self.warmup))


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(LearningRate):
    """Linear from 0 over `warmup` steps, then half a cosine to `floor` at step `total`.

    `floor` is a share of the full learning rate; it stays there after `total`. The full rate is kept until step `hold`
    where that is later than the warm-up (xAR: until 600 of 800 epochs).
    """

    warmup: float
    total: float
    floor: float
    hold: float = 0.0

    def __post_init__(self) -> None:
        if self.total <= self.warmup:
            raise ValueError(f"the warm-up of {self.warmup:g} steps must end before the total of {self.total:g} steps.")
        if self.total <= self.hold:
            raise ValueError(f"the rate is held until step {self.hold:g}, past the total of {self.total:g} steps.")

    def __call__(self, step: float) -> float:
        if step < self.warmup:
            return step / self.warmup
        start = max(self.warmup, self.hold)
        progress = min(1.0, max(0.0, step - start) / (self.total - start))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
