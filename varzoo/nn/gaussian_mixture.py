"""Mixtures of many Gaussians per position: the output head of ResGen (arXiv 2412.10208), and its training bound.

The means share learned centres, so that no number is predicted per component but its logit, and distances to all means
take two products of matrices, never a tensor of all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """V isotropic Gaussians over C channels, for every position `[...]`.

    Attributes:
        logits: `[..., V]` of the components.
        shift, scale: `[..., C]`; component v has its mean at shift + scale * centres[v].
        centres: `[V, C]`.
        variance: `[...]` of every channel of every component.
    """

    logits: Tensor
    shift: Tensor
    scale: Tensor
    centres: Tensor
    variance: Tensor

    def squared_distances(self, x: Tensor) -> Tensor:
        """Squared distances `[..., V]` of vectors `[..., C]` from all means."""
        offset, centres = x - self.shift, self.centres
        return (offset.square().sum(-1, keepdim=True) - 2 * (offset * self.scale) @ centres.T
                + self.scale.square() @ centres.square().T).clamp(min=0)

    def means(self, component: Tensor) -> Tensor:
        """The mean `[..., C]` of one component `[...]` per position."""
        return self.shift + self.scale * self.centres[component]

    @property
    def log_normaliser(self) -> Tensor:
        """log of the constant that divides every component's exponential, `[...]`."""
        return 0.5 * self.centres.shape[1] * (2 * math.pi * self.variance).log()

    def log_density(self, x: Tensor) -> Tensor:
        """log p `[...]` of vectors `[..., C]`."""
        exponents = -self.squared_distances(x) / (2 * self.variance[..., None])
        return (self.logits.log_softmax(dim=-1) + exponents).logsumexp(dim=-1) - self.log_normaliser

    def bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An upper bound of -log p as two terms `[...]`, regression and classification, for vectors `[..., C]`.

        With q(v) proportional to exp(-|x - mean_v|^2 / 2 variance), held constant (Jensen's inequality):
        sum_v q(v) |x - mean_v|^2 / 2 variance + log normaliser, and KL(q || softmax(logits)).
        Every component near the vector is pulled to it, however unlikely the logits make it now.
        """
        exponents = self.squared_distances(x) / (2 * self.variance[..., None])
        log_q = (-exponents).log_softmax(dim=-1).detach()
        q = log_q.exp()
        regression = (q * exponents).sum(dim=-1) + self.log_normaliser
        return regression, (q * (log_q - self.logits.log_softmax(dim=-1))).sum(dim=-1)

    def guided(self, null: GaussianMixture, scale: float) -> GaussianMixture:
        """null + scale (this - null) for logits and means; the variance stays this one's. Exact at scale 1."""
        if scale == 1:
            return self
        return replace(self, logits=torch.lerp(null.logits, self.logits, scale),
                       shift=torch.lerp(null.shift, self.shift, scale),
                       scale=torch.lerp(null.scale, self.scale, scale))


class GaussianMixtureHead(nn.Module):
    """Hidden states `[..., width]` -> a mixture over C channels.

    Means are shift(h) + scale(h) * (C_v + B u(h)): centres C_v of the components and a basis B of low rank are learned,
    the rest is linear in the hidden state. B u(h) moves all means alike.

    Args:
        width: of hidden states.
        channels: C.
        components: number of Gaussians V.
        rank: of B.
        least_std: the least standard deviation of a component; the data are sums of codes, which a mixture of points
            would fit with an infinite density.
    """

    def __init__(self, *, width: int, channels: int, components: int, rank: int, least_std: float) -> None:
        super().__init__()
        if components < 1 or rank < 1 or least_std <= 0:
            raise ValueError(f"need components, rank >= 1 and least_std > 0, got {components}, {rank} and {least_std}.")
        self.channels, self.least_std = channels, least_std
        self.logits = nn.Linear(width, components)
        self.affine = nn.Linear(width, 2 * channels)
        self.coefficients = nn.Linear(width, rank)
        self.log_variance = nn.Linear(width, 1)
        self.centres = nn.Parameter(torch.randn(components, channels))
        self.basis = nn.Parameter(torch.randn(channels, rank) / rank**0.5)
        for layer in (self.logits, self.affine, self.coefficients, self.log_variance):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> GaussianMixture:
        """The mixture, float32."""
        shift, scale = self.affine(hidden).float().chunk(2, dim=-1)
        scale = 1 + scale
        common = self.coefficients(hidden).float() @ self.basis.float().T
        variance = self.log_variance(hidden).float()[..., 0].exp() + self.least_std**2
        return GaussianMixture(logits=self.logits(hidden).float(), shift=shift + scale * common, scale=scale,
                               centres=self.centres.float(), variance=variance)
