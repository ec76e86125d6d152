"""Mean and covariance of features, streamed in float64, and the Fréchet distance between two such Gaussians.

Sums are kept raw: in float64 that loses about 4e-15 of the covariance, and merging processes is addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class SampleSet:
    """Which samples of a set have been counted, by their global index, so that none counts twice.

    Samplers that share a set among processes pad it; what has an index beyond `count`, or one that was seen before, is
    padding and is left out. Several accumulators of one pass may share one SampleSet through its `fresh` mask.

    Args:
        count: size of the whole set; None if it is not known.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.seen = torch.zeros(count or 0, dtype=torch.bool)

    def __len__(self) -> int:
        return int(self.seen.sum())

    def next_indices(self, n: int) -> Tensor:
        """The n indices after the largest seen: those of samples that come in order and without an index."""
        seen = self.seen.nonzero()
        return torch.arange(n) + (int(seen[-1]) + 1 if len(seen) else 0)

    def fresh(self, indices: Tensor) -> Tensor:
        """Count these samples: True `[n]` where a sample belongs to the set and had not been counted."""
        indices = indices.detach().cpu().long()
        if len(indices) and int(indices.min()) < 0:
            raise ValueError(f"sample indices start at 0, got {int(indices.min())}.")
        inside = indices < self.count if self.count is not None else torch.ones_like(indices, dtype=torch.bool)
        if inside.any():
            self._grow(int(indices[inside].max()) + 1)
        mask = torch.zeros_like(inside)
        mask[np.unique(indices.numpy(), return_index=True)[1]] = True  # a batch may repeat an index
        mask &= inside
        mask[inside] &= ~self.seen[indices[inside]]
        self.seen[indices[mask]] = True
        return mask

    def merge(self, other: SampleSet) -> None:
        """Add another process's samples. Raises ValueError if both counted the same one."""
        self._grow(len(other.seen))
        common = self.seen[:len(other.seen)] & other.seen
        _refuse_common(common)
        self.seen[:len(other.seen)] |= other.seen

    def all_reduce(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        """Replace this process's samples by those of all processes. Raises ValueError if two counted the same one."""
        length = torch.tensor(len(self.seen), device=device)
        dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
        self._grow(int(length))
        times = self.seen.to(device, torch.int32)
        dist.all_reduce(times, group=group)
        _refuse_common(times > 1)
        self.seen = times.cpu() > 0

    def _grow(self, length: int) -> None:
        if length > len(self.seen):
            self.seen = torch.cat([self.seen, torch.zeros(length - len(self.seen), dtype=torch.bool)])


def _refuse_common(common: Tensor) -> None:
    if common.any():
        index = int(common.nonzero()[0])
        raise ValueError(f"{int(common.sum())} samples were counted by two processes, such as sample {index}; give "
                         "every sample one global index, padding included.")


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]` of features, float64."""

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        dim = self.mean.shape[0]
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            raise ValueError(f"a Gaussian needs a mean [D] and a covariance [D, D], got {tuple(self.mean.shape)} and "
                             f"{tuple(self.covariance.shape)}.")


class Moments:
    """Streaming moments of features: n, sum of x and sum of x x^T.

    Args:
        dim: D, the number of features.
        count: size of the whole set of samples, beyond which an index is padding; None if it is not known.
        device: where the sums live.
    """

    def __init__(self, *, dim: int, count: int | None = None, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.samples = SampleSet(count)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        """Number of samples counted."""
        return len(self.samples)

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: `[B, D]`.
            index: global sample indices `[B]`; without them, samples are taken to come in order.

        Raises:
            ValueError: wrong shape, or features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be [B, {self.dim}], got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("features are not finite; the samples, or the extractor's weights, are broken.")
        fresh = self.samples.fresh(self.samples.next_indices(len(features)) if index is None else index)
        rows = features[fresh.to(features.device)].to(self.total.device, torch.float64)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def merge(self, other: Moments) -> None:
        """Add the samples of another shard."""
        self.samples.merge(other.samples)
        self.total += other.total.to(self.total.device)
        self.outer += other.outer.to(self.outer.device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the sums by those over all processes."""
        self.samples.all_reduce(group, self.total.device)
        dist.all_reduce(self.total, group=group)
        dist.all_reduce(self.outer, group=group)

    def gaussian(self, *, biased: bool = False) -> Gaussian:
        """Mean and covariance, divided by n - 1, or by n where `biased`. Raises ValueError for n < 2."""
        n = len(self)
        if n < 2:
            raise ValueError(f"a covariance needs at least two samples, got {n}.")
        total, outer = self.total.cpu(), self.outer.cpu()
        return Gaussian(total / n, (outer - torch.outer(total, total) / n) / (n if biased else n - 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.samples.seen.clone(), "total": self.total.clone(), "outer": self.outer.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.seen = state["seen"].clone()
        self.total.copy_(state["total"])
        self.outer.copy_(state["outer"])


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) (Fréchet distance, squared, of two Gaussians; arXiv 1706.08500).

    The trace of the root is that of the symmetric R S2 R with R = S1^(1/2), so eigenvalues stay real and rank-deficient
    covariances (fewer samples than features) need no correction.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"these features have {len(a.mean)} and {len(b.mean)} dimensions: two different extractors.")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return max(float(distance), 0.0)
