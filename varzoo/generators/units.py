"""Units: what one autoregressive step of a continuous generator draws at once (xAR's X, FlowAR's scales).

A unit kind lays a grid of tokens out as a sequence, unit after unit. Most kinds only permute the grid: the sequence is
the tokens in another order. `Scales` makes a pyramid instead: its last unit is the grid itself, the units before it are
smaller versions that exist only while a decoding runs.

Within the sequence visibility is one rule, `turn[key] <= turn[query]`: full inside a unit, causal over units. Training
takes it as a mask; decoding never needs it unless it feeds several units at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from varzoo.core.steps import Step
from varzoo.generators.orders import on_host

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """A sequence of units.

    Args:
        grid: (h, w) of the tokens.
        sizes: slots of each unit.
        positions: `[S]` what `Step.positions` calls each slot, ascending within a unit.
        coordinates: `[S, 2]` row and column of each slot, in units of the token grid.
    """

    grid: Grid
    sizes: tuple[int, ...]
    positions: Tensor
    coordinates: Tensor

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last (exclusive) slot of each unit."""
        return list(pairwise(accumulate(self.sizes, initial=0)))

    @cached_property
    @on_host
    def turn(self) -> Tensor:
        """`[S]` the unit of each slot."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` in raster order -> the sequence `[B, S, C]`."""
        return tokens[:, self.positions.to(tokens.device)]

    def merge(self, sequence: Tensor) -> Tensor:
        """The sequence `[B, S, C]` -> tokens `[B, N, C]` in raster order."""
        return torch.empty_like(sequence).index_copy_(1, self.positions.to(sequence.device), sequence)

    def steps(self, batch: int, device: torch.device) -> list[Step]:
        """The AR steps, one per unit."""
        total, positions = len(self.positions), self.positions.to(device)
        return [Step(index=index, of=len(self.sizes), positions=positions[start:stop].expand(batch, -1), drawn=start,
                     left=total - stop, total=total) for index, (start, stop) in enumerate(self.bounds)]


@dataclass(frozen=True, eq=False)
class Pyramid(Layout):
    """Scales of the grid, coarse to fine; `positions` count through all of them, the last N are the grid's raster.

    Args:
        sides: (h, w) of each scale.
    """

    sides: tuple[Grid, ...]

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` -> every scale, by area averages."""
        maps = to_map(tokens, self.grid)
        return torch.cat([to_tokens(F.interpolate(maps, side, mode="area")) for side in self.sides], dim=1)

    def merge(self, sequence: Tensor) -> Tensor:
        return sequence[:, -self.sizes[-1]:]


class Unit(ABC):
    """A kind of unit: grid -> layout."""

    @abstractmethod
    def arrange(self, grid: Grid) -> Layout:
        """The layout, on the current device."""

    @on_host
    def layout(self, grid: Grid) -> Layout:
        """The layout of a grid (h, w). Raises ValueError if the units do not fit it."""
        return self.arrange(grid)


@dataclass(frozen=True, kw_only=True)
class Cells(Unit):
    """Windows of neighbouring tokens, in raster order of the cells, raster inside: what xAR was published with.

    Args:
        size: (h, w) of a cell. [1, 1] makes every token a unit, the whole grid a single one.
    """

    size: Sequence[int]

    def arrange(self, grid: Grid) -> Layout:
        h, w = _pair(self.size, "a cell's size")
        _require_divisor(grid, (h, w), "cells")
        return _permuted(grid, rearrange(_raster(grid), "(a h) (b w) -> (a b) (h w)", h=h, w=w))


@dataclass(frozen=True, kw_only=True)
class Subsamples(Unit):
    """Tokens that lie `stride` apart, one unit per offset in raster order. No official code exists for this kind.

    Args:
        stride: (rows, columns) from a token to the next of its unit.
    """

    stride: Sequence[int]

    def arrange(self, grid: Grid) -> Layout:
        h, w = _pair(self.stride, "a stride")
        _require_divisor(grid, (h, w), "strides")
        return _permuted(grid, rearrange(_raster(grid), "(a h) (b w) -> (h w) (a b)", h=h, w=w))


@dataclass(frozen=True, kw_only=True)
class Scales(Unit):
    """Whole pictures of growing size; the last has the grid's. FlowAR's units; for xAR no official code exists.

    Args:
        sides: side (or (h, w)) of each scale, coarse to fine.
    """

    sides: Sequence[int | Sequence[int]]

    def arrange(self, grid: Grid) -> Pyramid:
        sides = tuple(_pair(side, "a scale's size") for side in self.sides)
        if not sides or sides[-1] != grid or any(min(b[0] - a[0], b[1] - a[1]) < 0 for a, b in pairwise(sides)):
            raise ValueError(f"scales grow and end with the grid of {grid[0]} x {grid[1]} tokens, got {list(sides)}.")
        coordinates = [_raster_coordinates(side) * (torch.tensor(grid) / torch.tensor(side)) for side in sides]
        sizes = tuple(h * w for h, w in sides)
        return Pyramid(grid, sizes, torch.arange(sum(sizes)), torch.cat(coordinates), sides)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens `[B, h w, C]` -> maps `[B, C, h, w]`."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])


def to_tokens(maps: Tensor) -> Tensor:
    """Maps `[B, C, h, w]` -> tokens `[B, h w, C]`."""
    return rearrange(maps, "b c h w -> b (h w) c")


def _pair(value: int | Sequence[int], what: str) -> Grid:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{what} is (h, w) of at least 1 each, got {value}.")
    return pair


def _require_divisor(grid: Grid, size: Grid, what: str) -> None:
    if grid[0] % size[0] or grid[1] % size[1]:
        fitting = [[d for d in range(1, side + 1) if side % d == 0] for side in grid]
        raise ValueError(f"{what} of {size[0]} x {size[1]} do not divide the grid of {grid[0]} x {grid[1]} tokens; "
                         f"heights that do: {fitting[0]}, widths: {fitting[1]}.")


def _raster(grid: Grid) -> Tensor:
    return torch.arange(grid[0] * grid[1]).view(grid)


def _raster_coordinates(grid: Grid) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).float()


def _permuted(grid: Grid, units: Tensor) -> Layout:
    """The layout whose units are rows `[units, n]` of raster positions."""
    positions = units.flatten()
    return Layout(grid, (units.shape[1],) * units.shape[0], positions, _raster_coordinates(grid)[positions])
