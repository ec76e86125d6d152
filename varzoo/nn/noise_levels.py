"""Which noise levels a rectified flow is trained at: laws of the time t in (0, 1), where 1 is noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws


class NoiseLevels(ABC):
    """A law of noise levels."""

    @abstractmethod
    def draw(self, draws: AnyDraws) -> Tensor:
        """One level `[B]` per sample, from the stream "noise_level"."""


@dataclass(frozen=True)
class Uniform(NoiseLevels):
    """Every level alike."""

    def draw(self, draws: AnyDraws) -> Tensor:
        return draws.uniform("noise_level")


@dataclass(frozen=True)
class LogitNormal(NoiseLevels):
    """The sigmoid of a standard normal: most levels in the middle (arXiv 2403.03206, section 3.1)."""

    def draw(self, draws: AnyDraws) -> Tensor:
        return draws.normal("noise_level").sigmoid()


@dataclass(frozen=True)
class StratifiedLogitNormal(NoiseLevels):
    """The same law, its quantiles spread evenly over the batch: so a level depends on the sample's row, too."""

    def draw(self, draws: AnyDraws) -> Tensor:
        uniform = draws.uniform("noise_level")
        quantile = (torch.arange(len(draws), device=uniform.device) + uniform) / len(draws)
        return (torch.erfinv(2 * quantile - 1) * math.sqrt(2)).sigmoid()


@dataclass(frozen=True)
class Mode(NoiseLevels):
    """1 - u - s (cos^2(pi u / 2) - 1 + u) of a uniform u: heavier around a mode (arXiv 2403.03206, eq. 20).

    Args:
        scale: s; 0 is uniform.
    """

    scale: float

    def draw(self, draws: AnyDraws) -> Tensor:
        uniform = draws.uniform("noise_level")
        return 1 - uniform - self.scale * ((math.pi * uniform / 2).cos().square() - 1 + uniform)
