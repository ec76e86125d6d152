"""What a training step returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise and its named parts (detached scalars, for the logs)."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def weighted_mean(per_sample: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of losses `[B]`, weighted by `[B]` where weights are given."""
    if weights is None:
        return per_sample.mean()
    weights = weights.to(per_sample.dtype)
    return (per_sample * weights).sum() / weights.sum().clamp(min=1e-9)


def weigh(parts: Mapping[str, Tensor], weights: Tensor | None) -> Losses:
    """The sum of parts `[B]`, averaged over the batch with the samples' weights."""
    means = {name: weighted_mean(part, weights) for name, part in parts.items()}
    return Losses(torch.stack(list(means.values())).sum(), {name: mean.detach() for name, mean in means.items()})
