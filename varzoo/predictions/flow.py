"""Tokens as samples of a rectified flow whose velocity a network gives, all positions of a step together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.nn.flow import Euler, FlowSolver, Velocity
from varzoo.predictions.base import Drawn, Prediction

DEFAULT_SOLVER = Euler()

Network = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class FlowPrediction(Prediction):
    """Tokens `[B, n, C]` at positions `[B, n]`, to be carried from noise to data.

    Attributes:
        network_at: (times `[K]`, most branches) -> network(x `[B, n, C]`, k, branches), whose velocities
            `[branches, B, n, C]` are the conditional one and, where two branches are asked for, the null one.
        scale: guidance scale; at 1 only the conditional branch is ever asked for.
        positions: `[B, n]` int64.
        channels: C.
        backbone_evaluations: see `Prediction`.

    Guidance is applied to the velocity, both branches at the same x. Noise is keyed by position and solver step k (0 is
    the noisiest).
    """

    network_at: Callable[[Tensor, int], Network]
    scale: float
    positions: Tensor
    channels: int
    backbone_evaluations: int

    options: ClassVar[frozenset[str]] = frozenset({"steps", "solver", "guided_times"})

    def draw(self, draws: AnyDraws, *, steps: int = 50, solver: FlowSolver = DEFAULT_SOLVER,
             guided_times: tuple[float, float] = (0.0, 1.0)) -> Drawn:
        """Solve the flow at every position.

        Args:
            draws: one row per sample.
            steps: solver steps, as the solver's grid counts them.
            solver: how to step, and at which times.
            guided_times: first and last time, both included, at which guidance acts (1 is noise).
        """
        low, high = guided_times
        if not 0 <= low <= high:
            raise ValueError(f"guided_times are two times 0 <= first <= last, got {low:g} and {high:g}.")
        size = (self.channels,)

        def velocity_at(times: Tensor) -> Velocity:
            guided = [self.scale != 1 and low <= time <= high for time in times.tolist()]
            network = self.network_at(times, 1 + any(guided))

            def velocity(x: Tensor, k: int) -> Tensor:
                branches = network(x, k, 1 + guided[k]).to(x.dtype)
                if len(branches) == 1:
                    return branches[0]
                conditional, null = branches
                return null + self.scale * (conditional - null)

            return velocity

        initial = draws.normal("init_noise", size, at=self.positions)
        solved = solver.solve(velocity_at, initial, lambda k: draws.normal(
            "step_noise", size, at=self.positions, dtype=torch.float64, k=k), steps=steps)
        return Drawn(tokens=solved.sample.float(), evaluations=solved.evaluations)
