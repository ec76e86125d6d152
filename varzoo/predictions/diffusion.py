"""Tokens as samples of a small diffusion model conditioned on a vector per position (arXiv 2406.11838)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.nn.diffusion import Diffusion
from varzoo.nn.diffusion_mlp import DiffusionMLP
from varzoo.nn.solvers import DDPM, Estimate, Solver
from varzoo.predictions.base import Drawn, Prediction

DEFAULT_SOLVER = DDPM()


@dataclass(frozen=True, kw_only=True)
class DiffusionPrediction(Prediction):
    """Tokens `[B, n, C]` at raster positions `[B, n]`, to be denoised by a network.

    Attributes:
        condition: `[1, B, n, D]`, or `[2, B, n, D]` with the null condition second where the step is guided.
        scale: guidance scale; without a null condition it has no effect.
        process: what the network was trained on.
        network: the head, with epsilon and v as output.

    Guidance is applied to epsilon at every evaluation, v is the conditional one's; both branches are evaluated at the
    same noised token. Noise is keyed by position and solver step k (0 is the noisiest), so two models, or two calls,
    denoise a position from the same noise.
    """

    condition: Tensor
    scale: float
    positions: Tensor
    process: Diffusion
    network: DiffusionMLP

    options: ClassVar[frozenset[str]] = frozenset({"steps", "solver", "temperature"})

    def draw(self, draws: AnyDraws, *, steps: int | str = 100, solver: Solver = DEFAULT_SOLVER,
             temperature: float = 1.0) -> Drawn:
        """Denoise every position.

        Args:
            draws: one row per sample.
            steps: solver steps, or a respacing string (see `varzoo.nn.diffusion.spaced_timesteps`).
            solver: how to step.
            temperature: scale of the noise that steps add, not of the initial noise.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature:g}.")
        if len(self.condition) == 2 and not solver.guides:
            raise ValueError(f"{type(solver).__name__} draws without guidance, got scale {self.scale:g}: choose DDPM "
                             "or DDIM, or guidance 1.")
        size = (self.network.channels,)
        solved = solver.solve(
            self.estimate_at, self.process, draws.normal("init_noise", size, at=self.positions),
            lambda k: draws.normal("step_noise", size, at=self.positions, k=k), steps=steps, temperature=temperature)
        return Drawn(tokens=solved.sample, evaluations=solved.evaluations)

    def estimate_at(self, times: Tensor) -> Estimate:
        """The guided (epsilon, v), each `[B, n, C]`, at times `[K]`, as a function of (noised, k)."""
        network = self.network.at(times, self.condition)

        def estimate(noised: Tensor, k: int) -> tuple[Tensor, Tensor]:
            epsilon, v = network(noised, k).to(noised.dtype).chunk(2, dim=-1)
            if len(epsilon) == 1:
                return epsilon[0], v[0]
            conditional, null = epsilon
            return null + self.scale * (conditional - null), v[0]

        return estimate
