"""Solvers of the reverse diffusion: short loops over a model-like callable, with the noise source handed in.

A solver chooses the times, so it asks for the network with them (`network_at(times)`), which lets a head compute what
depends on time alone before the loop. What it gets is `estimate(x, k) -> (epsilon, v)`, guidance applied, for the k-th
evaluation; k = 0 is the noisiest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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
        strided: N steps are every k-th timestep from 0 on ("ddimN"), not N evenly spaced up to the last.

    Attributes:
        guides: whether it takes a guided epsilon.
    """

    clip: int | None = None
    strided: bool = False

    guides: ClassVar[bool] = True

    def respaced(self, process: Diffusion, steps: int | str) -> Diffusion:
        """The process at this solver's times."""
        strided = self.strided and not isinstance(steps, str)
        times = spaced_timesteps(f"ddim{steps}" if strided else steps, len(process))
        return process.respaced(times if self.clip is None else [min(time, self.clip) for time in times])

    def refuse_temperature(self, temperature: float) -> None:
        """Raise ValueError, as solvers that add no noise do."""
        if temperature != 1:
            raise ValueError(f"{type(self).__name__} adds no noise that temperature {temperature:g} could scale; leave "
                             "it at 1, or choose DDPM.")

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
        self.refuse_temperature(temperature)
        process = self.respaced(process, steps)
        estimate, sample = network_at(_descending(process, initial)), initial
        for k, index in enumerate(reversed(range(len(process)))):
            epsilon, _ = estimate(sample, k)
            previous = float(process.alphas_cumprod_previous[index])
            sample = previous**0.5 * process.predict_clean(sample, index, epsilon) + (1 - previous) ** 0.5 * epsilon
        return Solved(sample=sample, evaluations=len(process))


@dataclass(frozen=True, kw_only=True)
class DPM(Solver):
    """DPM-Solver of first order (arXiv 2206.00927) on times of its own, as DiSA runs it for MAR.

    Its update, that of DPM-Solver++ of first order (arXiv 2211.01095) and DDIM's are the same; what differs is the
    grid: uniform in continuous time from clip / S down to 1 / M, where M timesteps of the process of S are kept, so
    that the network is asked between its timesteps. As officially, the kept ones are spread over [0, clip / S], which
    looks their signal up to a timestep late. There is no guidance with it: the official code lets both branches pass
    through unguided.
    """

    clip: int = 950

    guides: ClassVar[bool] = False

    def kept(self, process: Diffusion) -> int:
        """How many timesteps are kept: up to the clip, and none with less signal than a log(alpha / sigma) of -5.1."""
        abar = process.alphas_cumprod[:self.clip + 1]
        return int((np.log(abar / (1 - abar)) / 2 >= -5.1).sum())

    def times(self, process: Diffusion, steps: int | str) -> tuple[np.ndarray, np.ndarray]:
        """Times `[steps + 1]` in [0, 1], the noisiest first, and the log of sqrt(abar) at each."""
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"DPM takes a whole number of steps, at least 1, got {steps!r}.")
        log_alphas = np.log(process.alphas_cumprod[:self.kept(process)]) / 2
        kept, first = len(log_alphas), self.clip / len(process)
        times = np.linspace(first, 1 / kept, steps + 1, dtype=np.float32)
        return times, np.interp(times, first * np.arange(1, kept + 1) / kept, log_alphas)

    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float) -> Solved:
        self.refuse_temperature(temperature)
        times, log_alphas = self.times(process, steps)
        alphas, sigmas = np.exp(log_alphas), np.sqrt(-np.expm1(2 * log_alphas))
        network_times = torch.as_tensor(times[:-1] * len(process), device=initial.device)
        estimate, sample = network_at(network_times), initial
        for k in range(steps):
            epsilon, _ = estimate(sample, k)
            clean = (sample - float(sigmas[k]) * epsilon) / float(alphas[k])
            sample = float(alphas[k + 1]) * clean + float(sigmas[k + 1]) * epsilon
        return Solved(sample=sample, evaluations=steps)


def _descending(process: Diffusion, like: Tensor) -> Tensor:
    """The times of a process from the noisiest, on the device of `like`."""
    return torch.as_tensor(process.timesteps[::-1].copy(), device=like.device)
