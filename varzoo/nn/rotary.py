"""Rotary position embedding (arXiv 2104.09864) as explicit tables of rows, one row per position.

A table is `[rows, head_dim / 2, 2]` (cosine, sine). Cache slot, table row and grid position are three numbers that a
generator may relate as it likes; attention only ever sees rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def line_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rows of positions 0 .. length - 1: pair i turns by position * base^(-2i / head_dim)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(length).float()[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def axial_rows(coordinates: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rows of points `[rows, axes]`, whole or not; the pairs are shared out evenly over the axes, the first axis first.

    Raises:
        ValueError: head_dim does not split into pairs for every axis.
    """
    axes = coordinates.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim {head_dim} must be a multiple of {2 * axes} for {axes} rotary axes.")
    part = head_dim // axes
    frequencies = base ** (-torch.arange(0, part, 2, device=coordinates.device).float() / part)
    angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def axial_table(grid: Sequence[int], head_dim: int, base: float = 10000.0) -> Tensor:
    """Rows of a grid's positions in raster order (see `axial_rows`)."""
    return axial_rows(torch.cartesian_prod(*(torch.arange(side) for side in grid)).reshape(-1, len(grid)), head_dim,
                      base)


def zero_rows(count: int, head_dim: int) -> Tensor:
    """Rows with cosine and sine 0: they turn queries and keys into zero vectors (LlamaGen's condition tokens)."""
    return torch.zeros(count, head_dim // 2, 2)


def identity_rows(count: int, head_dim: int) -> Tensor:
    """Rows that turn nothing, for models whose positions are embedded otherwise."""
    return torch.stack([torch.ones(count, head_dim // 2), torch.zeros(count, head_dim // 2)], dim=-1)


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Turn adjacent channel pairs of queries or keys `[B, n, heads, head_dim]` by table rows `[(B,) n, head_dim/2, 2]`.

    Computed in float32, returned in the dtype of x.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rows.unsqueeze(-3).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
