"""Sums, means and rows over all processes of a run; without a process group, over this one alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors of equal shape, the same on each."""
    if _alone():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of the processes' tensors of equal shape, the same on each."""
    return tensor if _alone() else sum_over_processes(tensor) / distributed.get_world_size()


def means_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of several scalars, float32, by one message."""
    return dict(zip(values, mean_over_processes(torch.stack([value.detach().float() for value in values.values()]))))


def rows_of_processes(rows: Tensor) -> Tensor:
    """The rows `[n, ...]` of all processes, equally many of each, in order of rank: `[processes n, ...]`."""
    if _alone():
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
