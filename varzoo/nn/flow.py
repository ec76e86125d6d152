"""Solvers of rectified flow: short loops over a velocity-like callable, with time grid and noise source handed in.

A point of the flow is x = (1 - t) data + t noise, its velocity noise - data (arXiv 2209.03003; 2210.02747). A solver
knows its times in advance, so it asks for the network with them (`velocity_at(times)`), which lets a network compute
what depends on time alone before the loop. What it gets is `velocity(x, k)`, guidance applied, for the k-th evaluation.
Times are float64 on the host, so no solver waits for a device; the state is float64 outside of the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varzoo.nn.solvers import Noise, Solved

Velocity = Callable[[Tensor, int], Tensor]
VelocityAt = Callable[[Tensor], Velocity]


@dataclass(frozen=True, kw_only=True)
class TimeGrid(ABC):
    """A rule from a number of steps to the times of a flow."""

    minimum = 1

    def __call__(self, steps: int) -> Tensor:
        """Times `[K + 1]`, float64, on the host: the network is evaluated at the first K, the last is the end.

        Raises:
            ValueError: there are fewer steps than the grid can have, or a broken number of them.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < self.minimum:
            raise ValueError(f"{type(self).__name__} takes a whole number of solver steps, at least {self.minimum}, "
                             f"got {steps!r}.")
        with torch.device("cpu"):
            return self.times(steps)

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """The grid of a number of steps that is known to be good."""


@dataclass(frozen=True, kw_only=True)
class UniformGrid(TimeGrid):
    """From 1 to 0 in equal steps."""

    def times(self, steps: int) -> Tensor:
        return _linspace(1, 0, steps + 1)


@dataclass(frozen=True, kw_only=True)
class ShortGrid(TimeGrid):
    """From 1 to `last` in equal steps, then to 0 in one: xAR's grid (arXiv 2502.20388, official code), after SiT's.

    One step less would leave no step to `last`, hence at least 2. (The official loop needs 3, for a reason of its own.)
    """

    last: float = 0.04
    minimum = 2

    def __post_init__(self) -> None:
        if not 0 < self.last < 1:
            raise ValueError(f"the last time before 0 lies between 0 and 1, got {self.last}.")

    def times(self, steps: int) -> Tensor:
        return torch.cat([_linspace(1, self.last, steps), torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True, kw_only=True)
class PiecewiseGrid(TimeGrid):
    """FlowAR's grid (arXiv 2412.15205, official code): half of the steps from 1 to 0.3, half from 0.25 to 0.

    An odd number of steps evaluates once less than it says; exactly 50 steps are uniform, as officially.
    """

    minimum = 2

    def times(self, steps: int) -> Tensor:
        if steps == 50:
            return _linspace(1, 0, 51)
        half = steps // 2
        return torch.cat([_linspace(1, 0.3, half), _linspace(0.25, 0, half + 1)])


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class FlowSolver(ABC):
    """Base of the solvers: configuration alone, so one object serves any number of runs.

    Args:
        grid: the times it visits.
    """

    grid: TimeGrid

    @abstractmethod
    def solve(self, velocity_at: VelocityAt, initial: Tensor, noise: Noise, *, steps: int) -> Solved:
        """Run along the grid.

        Args:
            velocity_at: times `[K]` (float64, host) -> the network's guided velocity at (x, k), in any precision.
            initial: `[..., C]`, standard normal where the grid begins at 1.
            noise: k -> standard normal noise `[..., C]` of the k-th step; not called by a deterministic solver.
            steps: how many, as the grid counts them.

        Returns:
            The float64 sample and the number of evaluations.
        """


@dataclass(frozen=True, kw_only=True)
class Euler(FlowSolver):
    """x <- x + (t' - t) v: the flow's ordinary differential equation, in either direction of time."""

    grid: TimeGrid = field(default_factory=UniformGrid)

    def solve(self, velocity_at: VelocityAt, initial: Tensor, noise: Noise, *, steps: int) -> Solved:
        times = self.grid(steps)
        velocity, sample = velocity_at(times[:-1]), initial.double()
        for k, step in enumerate(times.diff().tolist()):
            sample = sample + step * velocity(sample, k).double()
        return Solved(sample=sample, evaluations=len(times) - 1)


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(FlowSolver):
    """The flow's reverse stochastic differential equation with diffusion 2 t, as xAR solves it (after SiT, 2401.08740).

    The score is s = -((1 - t) v + x) / t, the drift v - t s = (2 - t) v + x; the last step adds no noise. The grid goes
    down from 1 to 0.
    """

    grid: TimeGrid = field(default_factory=ShortGrid)

    def solve(self, velocity_at: VelocityAt, initial: Tensor, noise: Noise, *, steps: int) -> Solved:
        times = self.grid(steps)
        if len(times) < 3:
            raise ValueError(f"one stochastic step from time 1 to 0 gives no sample of the data: choose at least 2 "
                             f"steps, or Euler, got {steps}.")
        velocity, sample = velocity_at(times[:-1]), initial.double()
        last = len(times) - 2
        for k, (time, step) in enumerate(zip(times.tolist(), times.diff().tolist())):
            drift = (2 - time) * velocity(sample, k).double() + sample
            sample = sample + step * drift
            if k < last:
                sample = sample + (2 * time * -step) ** 0.5 * noise(k).double()
        return Solved(sample=sample, evaluations=len(times) - 1)
