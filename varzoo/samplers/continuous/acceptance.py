"""Which drafted continuous tokens are kept, and what takes the place of the others (CSpD, arXiv 2411.11925).

Draft and target denoise a token from the same noise. What is left of the ratio of their densities is that of the last
step's Gaussians, q and p, times a factor F for the spread of the steps before. All of it is computed in logarithms: a
product of sixteen small deviations underflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varzoo.core.errors import unknown
from varzoo.nn.solvers import Density

SIGNS = {"target_over_draft": 1.0, "draft_over_target": -1.0}
RoundNoise = Callable[[int], tuple[Tensor, Tensor]]


def log_density(x: Tensor, density: Density, tau: float = 1.0) -> Tensor:
    """log N(x; mean, std^2) `[...]` of `[..., C]`; tau divides the standardised residual, not the normaliser."""
    residual = (x - density.mean) / (density.std * tau)
    return (-residual.square() / 2 - density.std.log() - math.log(2 * math.pi) / 2).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """The test of a drafted token and the rejection sampler of its replacement.

    Args:
        tau: inner temperature of the test; large values forgive distance.
        factor: F is the ratio of the deviations of all steps but the last, "target_over_draft", as the official code
            has it, or its inverse, "draft_over_target", as the paper derives it.
        rounds: most proposals per token; one that never succeeds becomes the zero vector, as officially.
        until: proposals go on until all tokens of the "image" have succeeded once, or, as officially, all of the
            "batch", where images then depend on their neighbours. A later success takes the place of an earlier one.
    """

    tau: float = 42.0
    factor: str = "target_over_draft"
    rounds: int = 100
    until: str = "image"

    def __post_init__(self) -> None:
        if self.factor not in SIGNS:
            raise unknown("factor", self.factor, SIGNS)
        if self.until not in ("image", "batch"):
            raise unknown("extent of the proposals", self.until, ("image", "batch"))
        if self.tau <= 0 or self.rounds < 1:
            raise ValueError(f"need tau > 0 and rounds >= 1, got {self.tau:g} and {self.rounds}.")

    def log_factor(self, draft: Density, target: Density) -> Tensor:
        """log F, `[...]`."""
        return SIGNS[self.factor] * (target.log_std_sum - draft.log_std_sum).sum(dim=-1)

    def log_ratio(self, x: Tensor, draft: Density, target: Density) -> Tensor:
        """log(F p / q) `[...]` at drafted tokens x `[..., C]`; one is kept where the ratio exceeds a uniform."""
        return (log_density(x, target, self.tau) - log_density(x, draft, self.tau)) + self.log_factor(draft, target)

    def residual(self, x: Tensor, draft: Density, target: Density) -> Tensor:
        """max(0, p - q / F) / p `[...]`, with which a proposal x `[..., C]` from p is kept; without tau."""
        excess = log_density(x, draft) - log_density(x, target) - self.log_factor(draft, target)
        return -torch.expm1(excess.clamp(max=0))

    def replacements(self, draft: Density, target: Density, rejected: Tensor, noise: RoundNoise) -> Replacements:
        """Draw from the residual for all tokens `[B, n]`, as long as it takes.

        Args:
            rejected: `[B, n]`; an image without any takes no part (with `until` "batch": a batch without any).
            noise: round -> standard normals `[B, n, C]` and uniforms `[B, n]`.
        """
        tokens, first = torch.zeros_like(target.mean), torch.full_like(rejected, -1, dtype=torch.long)
        last = first.clone()
        count = 0
        while count < self.rounds:
            wanting = self._over(rejected) & self._over(first < 0)
            if not wanting.any():
                break
            normals, uniforms = noise(count)
            proposals = target.mean + target.std * normals
            succeeds = (uniforms < self.residual(proposals, draft, target)) & wanting
            tokens = torch.where(succeeds[..., None], proposals, tokens)
            first = torch.where(succeeds & (first < 0), count, first)
            last = torch.where(succeeds, count, last)
            count += 1
        return Replacements(tokens=tokens, rounds=count, first=first, last=last)

    def _over(self, flags: Tensor) -> Tensor:
        """Whether any token of its image (or batch) has the flag, broadcastable to `[B, n]`."""
        return flags.any(dim=1, keepdim=True) if self.until == "image" else flags.any()


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """Tokens `[B, n, C]` from the residual, the rounds that took, and each token's first and last success, or -1."""

    tokens: Tensor
    rounds: int
    first: Tensor
    last: Tensor
