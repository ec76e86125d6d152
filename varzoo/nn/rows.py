"""Rows of a batch of token sequences, at positions that differ from sample to sample."""

from __future__ import annotations

from torch import Tensor


def take_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """Rows `[B, n, C]` of tokens `[B, N, C]` at positions `[B, n]`."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


def put_rows(tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """A copy of tokens `[B, N, C]` with rows `[B, n, C]` at positions `[B, n]`."""
    return tokens.scatter(1, positions[..., None].expand(-1, -1, tokens.shape[-1]), rows)
