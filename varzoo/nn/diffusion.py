"""Gaussian diffusion over a grid of timesteps: tables, respacing and the hybrid training loss.

The process of improved DDPM (arXiv 2102.09672), as ADM, DiT and MAR use it. It knows nothing of networks: solvers
(`varzoo.nn.solvers`) step through it, predictions and generators bring the network. Tables are float64 NumPy arrays, so
that they equal the official ones and stay what they are under `torch.device("meta")`; diffusers' schedulers keep
float32 tables, draw their own noise and do not know this family's respacing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varzoo.core.errors import unknown


def cosine_betas(steps: int) -> np.ndarray:
    """Betas `[steps]` for abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), u in [0, 1], each at most 0.999."""
    abar = [math.cos((index / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for index in range(steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(abar)])


def linear_betas(steps: int) -> np.ndarray:
    """DDPM's betas `[steps]`, 1e-4 to 0.02 for 1000 steps and rescaled for other numbers."""
    return np.linspace(0.1 / steps, 20 / steps, steps)


SCHEDULES = {"cosine": cosine_betas, "linear": linear_betas}


def spaced_timesteps(steps: int | str, total: int) -> tuple[int, ...]:
    """The timesteps of a process of `total` that a sampler visits, ascending.

    Args:
        steps: how many, evenly spaced from 0 to total - 1; or a string: "N" is the same, "a,b,..." gives the numbers
            in equal sections of the timesteps (0 skips the section), "ddimN" takes every k-th timestep from 0 on for
            the smallest integer k that gives N; where there is none, as few of the last timesteps are left out as it
            takes (DiSA).

    Raises:
        ValueError: the string has none of these forms, or asks for more steps than there are.
    """
    text = str(steps)
    try:
        if text.startswith("ddim"):
            return _strided(int(text.removeprefix("ddim")), total)
        return _sections([int(count) for count in text.split(",")], total)
    except ValueError as error:
        raise ValueError(f"cannot space {text!r} steps over {total} timesteps: {error}. Give a number from 1 to "
                         f"{total}, sections such as '10,20,30', or 'ddimN'.") from error


def _strided(count: int, total: int) -> tuple[int, ...]:
    for end in range(total, 0, -1):
        for stride in range(1, end):
            if len(range(0, end, stride)) == count:
                return tuple(range(0, end, stride))
    raise ValueError(f"no integer stride gives {count} steps")


def _sections(counts: Sequence[int], total: int) -> tuple[int, ...]:
    if min(counts) < 0 or sum(counts) < 1:
        raise ValueError("at least one step is needed, and no negative number")
    size, longer = divmod(total, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"a section of {length} timesteps has no {count} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # accumulated and rounded half to even: published step grids hang on both
        start += length
    return tuple(timesteps)


class Diffusion:
    """q(x_i | x_0) = N(sqrt(abar_i) x_0, (1 - abar_i) I) for i = 0..S-1, and its posterior q(x_{i-1} | x_i, x_0).

    Args:
        betas: `[S]` variances of the steps, in (0, 1].
        timesteps: the time that a network is told at each step, by default 0..S-1; a respaced process keeps those of
            the process it was taken from.

    All tables are float64 arrays `[S]`, ascending in noise.
    """

    def __init__(self, betas: np.ndarray, timesteps: Sequence[int] | np.ndarray | None = None) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a non-empty list of numbers in (0, 1], got {betas}.")
        self.timesteps = np.arange(len(betas)) if timesteps is None else np.asarray(timesteps)
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        noise_share = (1 - self.alphas_cumprod_previous) / (1 - self.alphas_cumprod)
        self.log_betas = np.log(betas)
        self.posterior_variance = betas * noise_share
        # The first posterior variance is 0: its logarithm is taken from the next step (from beta if there is none).
        clipped = np.append(self.posterior_variance[1:2] if len(betas) > 1 else betas, self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)
        # "Fixed large": what is used where no variance is learned, beta but for the first step.
        self.fixed_log_variance = np.log(np.append(clipped[0], betas[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_previous) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = noise_share * np.sqrt(1 - betas)
        self._respaced: dict[tuple[int, ...], Diffusion] = {}

    @classmethod
    def named(cls, schedule: str, steps: int) -> Diffusion:
        """The process of a named noise schedule, "cosine" or "linear", with this number of steps."""
        if schedule not in SCHEDULES:
            raise unknown("noise schedule", schedule, SCHEDULES)
        return cls(SCHEDULES[schedule](steps))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, indices: Sequence[int]) -> Diffusion:
        """The process that visits only these steps of this one, with the same abar at each; made once and kept."""
        key = tuple(sorted(set(indices)))
        if key not in self._respaced:
            kept = self.alphas_cumprod[list(key)]
            betas = 1 - kept / np.append(1.0, kept[:-1])
            self._respaced[key] = Diffusion(betas, self.timesteps[list(key)])
        return self._respaced[key]

    def noised(self, clean: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_i | x_0): `clean` and `noise` `[..., C]`, `index` `[...]` int64."""
        return (_at(self.sqrt_alphas_cumprod, index, clean) * clean
                + _at(self.sqrt_one_minus_alphas_cumprod, index, clean) * noise)

    def predict_clean(self, noised: Tensor, index: Tensor | int, epsilon: Tensor) -> Tensor:
        """The x_0 that `noised` `[..., C]` is made of if its noise is `epsilon`; not clipped."""
        return (_at(self.sqrt_recip_alphas_cumprod, index, noised) * noised
                - _at(self.sqrt_recipm1_alphas_cumprod, index, noised) * epsilon)

    def posterior_mean(self, clean: Tensor, noised: Tensor, index: Tensor | int) -> Tensor:
        """The mean of q(x_{i-1} | x_i, x_0), `[..., C]`."""
        return (_at(self.posterior_mean_coef1, index, noised) * clean
                + _at(self.posterior_mean_coef2, index, noised) * noised)

    def learned_log_variance(self, v: Tensor, index: Tensor | int) -> Tensor:
        """Log variance `[..., C]` of a step for a network's `v`: between posterior (v = -1) and beta (v = 1)."""
        share = (v + 1) / 2
        return (share * _at(self.log_betas, index, v)
                + (1 - share) * _at(self.posterior_log_variance_clipped, index, v))


def _at(table: np.ndarray, index: Tensor | int, like: Tensor) -> Any:
    """Table entries, a tensor shaped to multiply `[..., C]`; a plain number for a plain index."""
    if isinstance(index, int):
        return float(table[index])
    return torch.as_tensor(table, dtype=like.dtype, device=like.device)[index][..., None]


def _noised_output(process: Diffusion, network: Callable[[Tensor, Tensor], Tensor], clean: Tensor, index: Tensor,
                   noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and what the network says to it."""
    noised = process.noised(clean, index, noise)
    times = torch.as_tensor(process.timesteps, device=index.device)[index]
    return noised, network(noised, times).to(clean.dtype)


def epsilon_loss(process: Diffusion, network: Callable[[Tensor, Tensor], Tensor], clean: Tensor, index: Tensor,
                 noise: Tensor) -> Tensor:
    """The squared error of epsilon (arXiv 2006.11239, eq. 14) `[...]`, a mean over channels; see `hybrid_loss`."""
    return (noise - _noised_output(process, network, clean, index, noise)[1]).square().mean(dim=-1)


def hybrid_loss(process: Diffusion, network: Callable[[Tensor, Tensor], Tensor], clean: Tensor, index: Tensor,
                noise: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of improved DDPM's loss (arXiv 2102.09672, 3.1) for epsilon and learned-range variance.

    Args:
        process: the full process; `index` counts its steps.
        network: (x_t `[..., C]`, time `[...]`) -> `[..., 2C]`, epsilon first, then v.
        clean: `[..., C]`; index: `[...]` int64; noise: `[..., C]`, standard normal.

    Returns:
        The squared error of epsilon and the variational bound in bits per dimension, both `[...]`, means over
        channels. The bound trains the variance alone (epsilon is detached in it) and is not rescaled. Its likelihood
        at the first step is the one of 8-bit pixels in [-1, 1] whatever the data is, as in every official user of it.
    """
    noised, output = _noised_output(process, network, clean, index, noise)
    epsilon, v = output.chunk(2, dim=-1)
    squared_error = (noise - epsilon).square().mean(dim=-1)

    mean = process.posterior_mean(process.predict_clean(noised, index, epsilon.detach()), noised, index)
    log_variance = process.learned_log_variance(v, index)
    true_mean = process.posterior_mean(clean, noised, index)
    true_log_variance = _at(process.posterior_log_variance_clipped, index, clean)
    divergence = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    likelihood = _pixel_log_likelihood(clean, mean, log_variance / 2)
    bound = torch.where(index[..., None] == 0, -likelihood, divergence).mean(dim=-1) / math.log(2)
    return squared_error, bound


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _pixel_log_likelihood(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of bins 2/255 wide around `values`, open at -1 and 1, under Gaussians; elementwise."""
    def cdf(bounds: Tensor) -> Tensor:
        z = (bounds - mean) * torch.exp(-log_std)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below, above = cdf(values - 1 / 255), cdf(values + 1 / 255)
    probability = torch.where(values < -0.999, above, torch.where(values > 0.999, 1 - below, above - below))
    return torch.log(probability.clamp(min=1e-12))
