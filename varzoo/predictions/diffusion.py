"""Tokens as samples of a diffusion conditioned on a vector per position: alone (arXiv 2406.11838) or as a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.nn.denoiser import Denoiser
from varzoo.nn.diffusion import Diffusion
from varzoo.nn.rows import take_rows
from varzoo.nn.solvers import DDPM, Estimate, Known, Solved, Solver
from varzoo.predictions.base import Drawn, Prediction

DEFAULT_SOLVER = DDPM()


@dataclass(frozen=True, kw_only=True)
class DiffusionPrediction(Prediction):
    """Tokens `[B, n, C]` at raster positions `[B, n]`, to be denoised by a network, each by itself.

    Attributes:
        condition: `[1, B, n, D]`, or `[2, B, n, D]` with the null condition second where the step is guided.
        scale: guidance scale; without a null condition it has no effect.
        positions: which positions are drawn.
        process: what the network was trained on.
        network: the head, with epsilon and perhaps v as output.
        phase: of the step; the noise of a phase other than "main" is drawn under names that begin with it.
        carry: what the decoding wants back on commit.

    Guidance is applied to epsilon at every evaluation, v is the conditional one's; both branches are evaluated at the
    same noised token. Noise is keyed by position and solver step k (0 is the noisiest), so two models, or two calls,
    denoise a position from the same noise.
    """

    condition: Tensor
    scale: float
    positions: Tensor
    process: Diffusion
    network: Denoiser
    phase: str = "main"
    carry: Any = None

    options: ClassVar[frozenset[str]] = frozenset({"steps", "solver", "temperature"})

    def draw(self, draws: AnyDraws, *, steps: int | str = 100, solver: Solver = DEFAULT_SOLVER,
             temperature: float = 1.0) -> Drawn:
        """Denoise every position; a density is that of the conditional branch's variance and the guided mean.

        Args:
            draws: one row per sample.
            steps: solver steps, or a respacing string (see `varzoo.nn.diffusion.spaced_timesteps`).
            solver: how to step.
            temperature: scale of the noise that steps add, not of the initial noise.
        """
        solved = self._solve(draws, self.positions, steps=steps, solver=solver, temperature=temperature)
        return Drawn(tokens=solved.sample, evaluations=solved.evaluations, density=solved.density)

    def _solve(self, draws: AnyDraws, at: Tensor, *, steps: int | str, solver: Solver, temperature: float,
               known: Known | None = None, **keys: Any) -> Solved:
        """Run the solver at positions `at` `[B, m]`, noise keyed by `keys` too."""
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature:g}.")
        if len(self.condition) == 2 and not solver.guides:
            raise ValueError(f"{type(solver).__name__} draws without guidance, got scale {self.scale:g}: choose DDPM "
                             "or DDIM, or guidance 1.")
        size, stream = (self.network.channels,), "" if self.phase == "main" else f"{self.phase}_"
        return solver.solve(
            self.estimate_at, self.process, draws.normal(f"{stream}init_noise", size, at=at, **keys),
            lambda k: draws.normal(f"{stream}step_noise", size, at=at, k=k, **keys),
            steps=steps, temperature=temperature, known=known)

    def estimate_at(self, times: Tensor) -> Estimate:
        """The guided (epsilon, v), each `[B, n, C]`, at times `[K]`, as a function of (noised, k).

        v is None where the network gives epsilon alone.
        """
        network, channels = self.network.at(times, self.condition), self.network.channels

        def estimate(noised: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
            epsilon, rest = network(noised, k).to(noised.dtype).tensor_split([channels], dim=-1)
            v = rest[0] if rest.shape[-1] else None
            if len(epsilon) == 1:
                return epsilon[0], v
            conditional, null = epsilon
            return null + self.scale * (conditional - null), v

        return estimate


@dataclass(frozen=True, kw_only=True)
class MapDiffusionPrediction(DiffusionPrediction):
    """Tokens `[B, n, C]` at raster positions `[B, n]` of a map `[B, N, C]` that a network denoises as a whole.

    Attributes:
        condition: `[1 or 2, B, N, D]`, of every position.
        known: the tokens of the map that are given, mask `[B, N, 1]` and values `[B, N, C]`.
        redraw: how often this map was drawn before; every time has noise of its own.

    What is neither given nor asked for is drawn too, and left.
    """

    known: Known
    redraw: int

    def draw(self, draws: AnyDraws, *, steps: int | str = 100, solver: Solver = DEFAULT_SOLVER,
             temperature: float = 1.0) -> Drawn:
        """Denoise the map and take the positions asked for; options as in `DiffusionPrediction`."""
        batch, count = self.condition.shape[1:3]
        everywhere = torch.arange(count, device=self.condition.device).expand(batch, -1)
        solved = self._solve(draws, everywhere, steps=steps, solver=solver, temperature=temperature, known=self.known,
                             redraw=self.redraw)
        return Drawn(tokens=take_rows(solved.sample, self.positions), evaluations=solved.evaluations)
