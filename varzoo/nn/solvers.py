"""Solvers of the reverse diffusion: short loops over a model-like callable, with the noise source handed in.

A solver chooses the times, so it asks for the network with them (`network_at(times)`), which lets a head compute what
depends on time alone before the loop. What it gets is `estimate(x, k) -> (epsilon, v)`, guidance applied, for the k-th
evaluation; k = 0 is the noisiest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varzoo.nn.diffusion import Diffusion, spaced_timesteps

Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
NetworkAt = Callable[[Tensor], Estimate]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where a solver arrived, and how often it evaluated the network."""

    sample: Tensor
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base of the solvers: configuration alone, so one object serves any number of runs.

    Args:
        clip: latest timestep to begin at, None for the process's own last. Times beyond it move onto it (as in DiSA,
            arXiv 2505.20297, whose samplers clip at 950 and 980). At the very end of a cosine schedule an error of
            epsilon is amplified some ten thousand times, which a briefly trained network does not survive.
    """

    clip: int | None = None

    def respaced(self, process: Diffusion, steps: int | str) -> Diffusion:
        """The process at this solver's times."""
        times = spaced_timesteps(steps, len(process))
        return process.respaced(times if self.clip is None else [min(time, self.clip) for time in times])

    @abstractmethod
    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float) -> Solved:
        """Run from noise to a sample.

        Args:
            network_at: times `[K]` -> the network's guided (epsilon, v) at (x, k).
            process: the process that the network was trained on.
            initial: `[..., C]`, standard normal.
            noise: k -> the standard normal noise `[..., C]` of the k-th step.
            steps: how many, or a respacing string (see `spaced_timesteps`).
            temperature: scale of the noise that steps add; 0 draws none.
        """


@dataclass(frozen=True, kw_only=True)
class DDPM(Solver):
    """Ancestral sampling (arXiv 2006.11239) with learned-range variance (arXiv 2102.09672), x_0 not clipped.

    The temperature scales the step noises only, as in MAR; the last step adds none.
    """

    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float) -> Solved:
        process = self.respaced(process, steps)
        estimate, sample = network_at(_descending(process, initial)), initial
        for k, index in enumerate(reversed(range(len(process)))):
            epsilon, v = estimate(sample, k)
            mean = process.posterior_mean(process.predict_clean(sample, index, epsilon), sample, index)
            sample = mean
            if index > 0 and temperature > 0:
                sample = mean + temperature * torch.exp(process.learned_log_variance(v, index) / 2) * noise(k)
        return Solved(sample=sample, evaluations=len(process))


@dataclass(frozen=True, kw_only=True)
class DDIM(Solver):
    """Deterministic sampling (arXiv 2010.02502, eta = 0); the network's variance is not used."""

    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float) -> Solved:
        if temperature != 1:
            raise ValueError(f"DDIM adds no noise that temperature {temperature:g} could scale; leave it at 1, "
                             "or choose DDPM.")
        process = self.respaced(process, steps)
        estimate, sample = network_at(_descending(process, initial)), initial
        for k, index in enumerate(reversed(range(len(process)))):
            epsilon, _ = estimate(sample, k)
            previous = float(process.alphas_cumprod_previous[index])
            sample = previous**0.5 * process.predict_clean(sample, index, epsilon) + (1 - previous) ** 0.5 * epsilon
        return Solved(sample=sample, evaluations=len(process))


def _descending(process: Diffusion, like: Tensor) -> Tensor:
    """The times of a process from the noisiest, on the device of `like`."""
    return torch.as_tensor(process.timesteps[::-1].copy(), device=like.device)
