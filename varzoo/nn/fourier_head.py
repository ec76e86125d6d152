"""The Fourier head (arXiv 2410.22269, 3): a density on [-1, 1] as a non-negative Fourier series, and bins of it.

A linear layer gives complex alpha_0 .. alpha_N. The density is |sum_l alpha_l exp(i pi l z)|^2, normalised: by
Fejer-Riesz any non-negative trigonometric polynomial is of this form, and expanding the square gives the series

    p(z) = 1/2 + Re sum_{k=1..N} c_k / c_0 exp(i pi k z),   c_k = sum_l conj(alpha_l) alpha_{l+k}

which is the official form. It is evaluated as the square here: cheaper, and never below zero. p is periodic, so that
the first and the last bin are neighbours: a limit of the method where the range ends in tails.

Official code: nate-gillman/fourier-head (`fourier_head.py`, `fourier_head_mle.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BISECTIONS = 25  # official


class FourierHead(nn.Module):
    """Features `[..., in_features]` -> logits `[..., out_features]` over ordered bins of equal width in [-1, 1].

    It takes the place of `nn.Linear(in_features, out_features)` where neighbouring bins mean similar things. It runs in
    float32 whatever the features are. `penalty` is to be added to the loss; no forward pass leaves it behind.

    Args:
        in_features: D.
        out_features: number of bins M.
        frequencies: N; with 0 every bin is equally likely.
        penalty_weight: gamma of `penalty` (official default 0).
        floor: added to each bin's probability before the logarithm (official 1e-5).
        weight_divisor, bias_divisor: torch's initial weight and bias of the linear layer are divided by these
            (official 100 both).

    Raises:
        ValueError: a number that is out of place.
    """

    harmonics: Tensor

    def __init__(self, in_features: int, out_features: int, *, frequencies: int, penalty_weight: float, floor: float,
                 weight_divisor: float, bias_divisor: float) -> None:
        super().__init__()
        if out_features < 2 or frequencies < 0 or penalty_weight < 0 or floor <= 0:
            raise ValueError("need at least 2 bins, frequencies >= 0, penalty_weight >= 0 and floor > 0, got "
                             f"{out_features}, {frequencies}, {penalty_weight} and {floor}.")
        self.frequencies, self.penalty_weight, self.floor = frequencies, penalty_weight, floor
        self.coefficients = nn.Linear(in_features, 2 * (frequencies + 1))
        with torch.no_grad():
            self.coefficients.weight /= weight_divisor
            self.coefficients.bias.div_(bias_divisor)
        edges = torch.linspace(-1, 1, out_features + 1)
        self.register_buffer("harmonics", harmonics((edges[:-1] + edges[1:]) / 2, frequencies), persistent=False)

    def alpha(self, features: Tensor) -> Tensor:
        """Complex coefficients `[..., N + 1]`."""
        real, imaginary = self.coefficients(features).float().chunk(2, dim=-1)
        return torch.complex(real, imaginary)

    def forward(self, features: Tensor) -> Tensor:
        """log(p + floor) of every bin; p sums to 1, the exponentials of the logits to 1 + M floor."""
        density = squared_modulus(self.alpha(features) @ self.harmonics)
        return (density / density.sum(dim=-1, keepdim=True) + self.floor).log()

    def penalty(self, features: Tensor) -> Tensor:
        """gamma 2 mean_rows sum_k 2 pi^2 k^2 |c_k|^2: rough densities cost (arXiv 2410.22269, 3.2).

        As officially, c is not normalised, so that large coefficients cost too.
        """
        coefficients = autocorrelation(self.alpha(features))
        k = torch.arange(self.frequencies + 1, device=coefficients.device)
        roughness = (2 * math.pi**2 * k**2 * squared_modulus(coefficients)).sum(dim=-1)
        return self.penalty_weight * 2 * roughness.mean()


def squared_modulus(x: Tensor) -> Tensor:
    return x.real.square() + x.imag.square()


def harmonics(z: Tensor, frequencies: int) -> Tensor:
    """exp(i pi l z) for l = 0 .. N at points `[...]`: complex `[N + 1, ...]`."""
    index = torch.arange(frequencies + 1, dtype=z.dtype, device=z.device).view(-1, *[1] * z.ndim)
    angles = math.pi * index * z
    return torch.complex(angles.cos(), angles.sin())


def autocorrelation(alpha: Tensor) -> Tensor:
    """c_k = sum_l conj(alpha_l) alpha_{l+k}, k = 0 .. N: complex `[..., N + 1]`."""
    count = alpha.shape[-1]
    spectrum = torch.fft.fft(alpha, n=2 * count, dim=-1)  # padded, or the ends would meet
    return torch.fft.ifft(squared_modulus(spectrum), dim=-1)[..., :count]


def density(alpha: Tensor, z: Tensor) -> Tensor:
    """The density at points z `[R]` or `[R, P]` in [-1, 1], of coefficients `[R, N + 1]`."""
    waves = harmonics(z, alpha.shape[-1] - 1).movedim(0, -1)
    total = (waves * alpha.view(len(alpha), *[1] * (z.ndim - 1), -1)).sum(dim=-1)
    mass = 2 * squared_modulus(alpha).sum(dim=-1)
    return squared_modulus(total) / mass.view(-1, *[1] * (z.ndim - 1))


def cumulative(alpha: Tensor, z: Tensor) -> Tensor:
    """The distribution function at z `[R]`: (z + 1) / 2 + Re sum_k c_k / c_0 (exp(i pi k z) - (-1)^k) / (i pi k)."""
    c = autocorrelation(alpha)
    k = torch.arange(1, alpha.shape[-1], dtype=z.dtype, device=z.device)
    waves = harmonics(z, len(k))[1:].T - (1 - 2 * (k % 2))
    return (z + 1) / 2 + (c[:, 1:] / c[:, :1].real * waves / (1j * math.pi * k)).real.sum(dim=-1)


def quantile(alpha: Tensor, u: Tensor) -> Tensor:
    """Where the distribution function reaches u `[R]`, by bisection: a sample, if u is uniform."""
    low, high = -torch.ones_like(u), torch.ones_like(u)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = cumulative(alpha, middle) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
