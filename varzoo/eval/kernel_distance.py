"""Kernel inception distance (arXiv 1801.01401): unbiased squared MMD under a polynomial kernel, over random subsets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def subset_indices(samples: int, references: int, *, subsets: int, size: int, seed: int = 2020) -> list[
        tuple[Tensor, Tensor]]:
    """Rows of every subset, samples' and references', as torch-fidelity draws them: by index, so for every order alike.

    Raises:
        ValueError: there are fewer rows than a subset has.
    """
    if min(samples, references) < size:
        raise ValueError(f"subsets of {size} need as many samples and references, got {samples} and {references}; set "
                         "a smaller subset size.")
    random = np.random.RandomState(seed)
    def drawn(count: int) -> Tensor:
        return torch.from_numpy(random.choice(count, size, replace=False))

    return [(drawn(samples), drawn(references)) for _ in range(subsets)]


def polynomial_mmd(x: Tensor, y: Tensor, *, degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> float:
    """Unbiased squared MMD of `[m, D]` and `[m, D]` under (gamma x.y + coef0)^degree; gamma is 1 / D by default."""
    x, y = x.double(), y.double()
    scale = 1 / x.shape[1] if gamma is None else gamma
    m = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T * scale + coef0) ** degree

    within = sum(kernel(rows, rows).sum() - (rows.square().sum(1) * scale + coef0).pow(degree).sum() for rows in (x, y))
    return float(within / (m * (m - 1)) - 2 * kernel(x, y).mean())


def kernel_distance(samples: Tensor, references: Tensor, indices: Iterable[tuple[Tensor, Tensor]],
                    **kernel: Any) -> tuple[float, float]:
    """Mean and population standard deviation of `polynomial_mmd` over subsets (`subset_indices`)."""
    values = [polynomial_mmd(samples[own], references[theirs], **kernel) for own, theirs in indices]
    return float(np.mean(values)), float(np.std(values))
