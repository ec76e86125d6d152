"""Solvers of the reverse diffusion: short loops over a model-like callable, with the noise source handed in.

A solver chooses the times, so it asks for the network with them (`network_at(times)`), which lets a head compute what
depends on time alone before the loop. What it gets is `estimate(x, k) -> (epsilon, v)`, guidance applied, for the k-th
evaluation; k = 0 is the noisiest one, and v is None where the network learned no variance.
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

Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
NetworkAt = Callable[[Tensor], Estimate]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Density:
    """The diagonal Gaussian of a solver's last step, and the spread of those before it.

    Attributes:
        mean, std: `[..., C]` of the last step; the std includes the temperature.
        log_std_sum: `[..., C]` sum over the steps before of the logarithm of their std, without the temperature.
    """

    mean: Tensor
    std: Tensor
    log_std_sum: Tensor


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where a solver arrived, how often it evaluated the network and, where it draws noise, from which Gaussian."""

    sample: Tensor
    evaluations: int
    density: Density | None = None


@dataclass(frozen=True, kw_only=True)
class Known:
    """Tokens of a map that are given: before every step they take the place of what was sampled there.

    Args:
        mask: `[..., 1]`, True where the token is given.
        values: `[..., C]`, read there alone.
    """

    mask: Tensor
    values: Tensor

    def imposed(self, sample: Tensor, alpha: float, sigma: float, noise: Tensor) -> Tensor:
        """The sample with the given tokens at a noise level, alpha times the token plus sigma times the noise."""
        return torch.where(self.mask, alpha * self.values + sigma * noise, sample)


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
        has_density: whether it says from which Gaussian a sample is, at temperatures above 0.
    """

    clip: int | None = None
    strided: bool = False

    guides: ClassVar[bool] = True
    has_density: ClassVar[bool] = False

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
              temperature: float, known: Known | None = None) -> Solved:
        """Run from noise to a sample.

        Args:
            network_at: times `[K]` -> the network's guided (epsilon, v) at (x, k).
            process: the process that the network was trained on.
            initial: `[..., C]`, standard normal.
            noise: k -> the standard normal noise `[..., C]` of the k-th step.
            steps: how many, or a respacing string (see `spaced_timesteps`).
            temperature: scale of the noise that steps add; 0 draws none.
            known: tokens that are given. They get the initial noise at every step, and are not restored after the last.
        """


@dataclass(frozen=True, kw_only=True)
class DDPM(Solver):
    """Ancestral sampling (arXiv 2006.11239), x_0 not clipped.

    The variance is the network's, of learned range (arXiv 2102.09672), or the process's fixed one where none was
    learned. The temperature scales the step noises only, as in MAR; the last step adds none, so that the sample is the
    mean of its density.
    """

    has_density: ClassVar[bool] = True

    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float, known: Known | None = None) -> Solved:
        process = self.respaced(process, steps)
        estimate, sample = network_at(_descending(process, initial)), initial
        log_std_sum = torch.zeros_like(initial)
        for k, index in enumerate(reversed(range(len(process)))):
            sample = _imposed(sample, known, process, index, initial)
            epsilon, v = estimate(sample, k)
            sample = process.posterior_mean(process.predict_clean(sample, index, epsilon), sample, index)
            if temperature > 0:
                log_std = (torch.full_like(sample, process.fixed_log_variance[index] / 2) if v is None
                           else process.learned_log_variance(v, index) / 2)
                if index > 0:
                    sample = sample + temperature * log_std.exp() * noise(k)
                    log_std_sum = log_std_sum + log_std
        density = (Density(mean=sample, std=temperature * log_std.exp(), log_std_sum=log_std_sum) if temperature > 0
                   else None)
        return Solved(sample=sample, evaluations=len(process), density=density)


@dataclass(frozen=True, kw_only=True)
class DDIM(Solver):
    """Deterministic sampling (arXiv 2010.02502, eta = 0); the network's variance is not used."""

    def solve(self, network_at: NetworkAt, process: Diffusion, initial: Tensor, noise: Noise, *, steps: int | str,
              temperature: float, known: Known | None = None) -> Solved:
        self.refuse_temperature(temperature)
        process = self.respaced(process, steps)
        estimate, sample = network_at(_descending(process, initial)), initial
        for k, index in enumerate(reversed(range(len(process)))):
            sample = _imposed(sample, known, process, index, initial)
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
              temperature: float, known: Known | None = None) -> Solved:
        self.refuse_temperature(temperature)
        times, log_alphas = self.times(process, steps)
        evaluations = len(times) - 1
        alphas, sigmas = np.exp(log_alphas), np.sqrt(-np.expm1(2 * log_alphas))
        network_times = torch.as_tensor(times[:-1] * len(process), device=initial.device)
        estimate, sample = network_at(network_times), initial
        for k in range(evaluations):
            sample = sample if known is None else known.imposed(sample, float(alphas[k]), float(sigmas[k]), initial)
            epsilon, _ = estimate(sample, k)
            clean = (sample - float(sigmas[k]) * epsilon) / float(alphas[k])
            sample = float(alphas[k + 1]) * clean + float(sigmas[k + 1]) * epsilon
        return Solved(sample=sample, evaluations=evaluations)


def _imposed(sample: Tensor, known: Known | None, process: Diffusion, index: int, noise: Tensor) -> Tensor:
    """The sample at a step of the process, with what is given, if anything, in its place."""
    if known is None:
        return sample
    alpha, sigma = process.sqrt_alphas_cumprod[index], process.sqrt_one_minus_alphas_cumprod[index]
    return known.imposed(sample, float(alpha), float(sigma), noise)


def _descending(process: Diffusion, like: Tensor) -> Tensor:
    """The times of a process from the noisiest, on the device of `like`."""
    return torch.as_tensor(process.timesteps[::-1].copy(), device=like.device)
