"""TokenBridge's quantiser (arXiv 2503.16430, 3.2): each number by itself, into bins of equal mass under a Gaussian.

Nothing is learned. Numbers in [low, high] are mapped to t in [-spread, spread], where the bins' edges are quantiles of
N(0, 1), the outermost clamped; a bin stands for the mean of the normal within it. As officially, a number takes the
bin whose *mean* is nearest, which near an edge may be the neighbour of the bin it lies in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def gaussian_bins(levels: int, spread: float) -> tuple[Tensor, Tensor]:
    """Edges `[levels + 1]` and means `[levels]` of the bins in t, float32."""
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)  # checks would refuse the meta device
    # A float32 grid, its quantiles in float64, all else in float32, in this order: then every bit is as officially.
    edges = normal.icdf(torch.linspace(0, 1, levels + 1).double()).clamp(-spread, spread).float()
    density = torch.exp(-0.5 * edges.square()) / math.sqrt(2 * math.pi)
    return edges, (density[:-1] - density[1:]) / normal.cdf(edges).diff()


class GaussianQuantizer(nn.Module):
    """Numbers <-> ids of a fixed table, the same for every channel.

    Args:
        levels: number of bins. Within 3 standard deviations at most 740: with more, the outermost would be empty (the
            official table then breaks from 1024 on, the next power of two).
        low, high: the range; numbers outside are clamped.
        spread: how many standard deviations the range spans on either side.

    Raises:
        ValueError: an empty range, or levels that do not fit.
    """

    means: Tensor
    table: Tensor

    def __init__(self, *, levels: int, low: float, high: float, spread: float) -> None:
        super().__init__()
        if not low < high or spread <= 0:
            raise ValueError(f"need low < high and spread > 0, got low={low}, high={high}, spread={spread}.")
        most = math.floor(2 / math.erfc(spread / math.sqrt(2)))  # 1 / the normal's mass beyond `spread`
        if not 2 <= levels <= most:
            raise ValueError(f"{levels} levels do not fit into {spread:g} standard deviations: choose 2 to {most}, or "
                             "the outermost bins are empty.")
        self.levels, self.low, self.high, self.spread = levels, low, high, spread
        means = gaussian_bins(levels, spread)[1]
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("table", (means + spread) / (2 * spread) * (high - low) + low, persistent=False)

    def ids(self, numbers: Tensor) -> Tensor:
        """Ids int64 of numbers, of the same shape; of two means equally near the lower."""
        t = (numbers.float() - self.low) / (self.high - self.low) * (2 * self.spread) - self.spread
        t = t.clamp(-self.spread, self.spread)
        return (t[..., None] - self.means).abs().argmin(dim=-1)

    def values(self, ids: Tensor) -> Tensor:
        """What ids stand for, float32 of the same shape."""
        return self.table[ids]

    def outside(self, numbers: Tensor) -> Tensor:
        """Which numbers are outside of the range, and so clamped: bool of the same shape."""
        return (numbers < self.low) | (numbers > self.high)
