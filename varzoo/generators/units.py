"""Units: what one autoregressive step of a continuous generator draws at once (xAR's X, FlowAR's scales).

A unit kind lays a grid of tokens out as a sequence, unit after unit. Most kinds only permute the grid: the sequence is
the tokens in another order. `Scales` makes a pyramid instead: its last unit is the grid itself, the units before it are
smaller versions that exist only while a decoding runs.

Within the sequence visibility is one rule, `turn[key] <= turn[query]`: full inside a unit, causal over units. Training
takes it as a mask; decoding never needs it unless it feeds several units at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch
from varzoo.generators.base import Condition, Decoding
from varzoo.generators.orders import on_host
from varzoo.nn.modulated_transformer import ModulatedTransformer

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


class UnitDecoding(Decoding):
    """Base of decodings that draw unit after unit, with one cache for both branches.

    The cache holds some units of each branch, always the first ones. What a branch lacks is fed together with the next
    unit that it is needed for, under the mask, and never in a run of its own: a finished unit goes in with the first
    evaluation of the next, and a null branch that was idle while the scale was 1 catches up when it is wanted.

    Subclasses say what is fed of a unit. `ahead` is 1 where that is known before the unit's tokens are (FlowAR), and 0
    where it is the tokens themselves (xAR), so that only what was fed of earlier units may stay in the cache.

    Attributes:
        held: how many units of each branch, conditional and null, the cache holds.
    """

    ahead: ClassVar[int]

    def __init__(self, *, backbone: ModulatedTransformer, layout: Layout, visible: Tensor, channels: int, batch: int,
                 guidance: Schedule | None) -> None:
        self._backbone, self._layout, self._visible, self._guidance = backbone, layout, visible, guidance
        self._bounds, device = layout.bounds, visible.device
        self._plan = layout.steps(batch, device)
        self.batch, self._branches = batch, 1 + needs_null_branch(guidance, self._plan)
        self._cache = backbone.new_cache(batch * self._branches)
        self.held = [0] * self._branches
        # float32 whatever the weights are: rounding latents would be seen in the pixels
        self._sequence = torch.zeros(batch, len(layout.positions), channels, device=device)
        self._done = 0

    @property
    def steps(self) -> Iterator[Step]:
        while self._done < len(self._plan):
            yield self._plan[self._done]

    @property
    def tokens(self) -> Tensor:
        return self._layout.merge(self._sequence)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        start, stop = self._bounds[step.index]
        self._sequence[:, start:stop] = tokens.to(self._sequence.dtype)
        self.held = [min(held, step.index + self.ahead) for held in self.held]
        self._done = step.index + 1

    def scale(self, step: Step) -> float:
        return 1.0 if self._guidance is None else self._guidance(step)

    def first_to_feed(self, index: int, branches: int) -> int:
        """The first unit that must be fed before unit `index` can be, so that all of the branches know what is past."""
        return min(index, *self.held[:branches])

    def run(self, x: Tensor, modulations: Sequence[Tensor], *, first: int, index: int, branches: int,
            groups: Tensor | None = None) -> Tensor:
        """Feed units `first` to `index`, embedded `[branches B, n, width]`; hidden states of the last, same shape."""
        start, stop = self._bounds[first][0], self._bounds[index][1]
        self._cache.reach = stop
        hidden = self._backbone(
            x, modulations, slots=slice(start, stop), groups=groups,
            mask=None if first == index else self._visible[start:stop, :stop],
            cache=self._cache if branches == self._branches else self._cache.first(branches * self.batch))
        self.held[:branches] = [index + self.ahead] * branches
        return hidden[:, self._bounds[index][0] - start:]


def require_continuous_grid(spec: TokenSpec, who: str) -> Grid:
    """The grid of a spec. Raises ValueError unless it is a grid of continuous tokens."""
    if spec.kind != "continuous" or len(spec.shape) != 2:
        raise ValueError(f"{who} models a grid of continuous tokens, got a spec of {spec}. Choose a tokenizer "
                         "without a codebook, such as kl16.")
    return spec.shape


def class_table(num_classes: int, width: int, drop: float) -> nn.Embedding:
    """A vector per class, the null class last. Raises ValueError if `drop` is no probability."""
    if num_classes < 1 or not 0 <= drop <= 1:
        raise ValueError(f"need num_classes >= 1 and 0 <= class_drop <= 1, got {num_classes} and {drop}.")
    table = nn.Embedding(num_classes + 1, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def class_vectors(table: nn.Embedding, condition: Condition, dropped: Tensor | None = None) -> Tensor:
    """Class vectors `[B, width]`: the null class's where there are no labels, or where `dropped` `[B]` is True."""
    null = table.num_embeddings - 1
    labels = condition.labels
    if labels is None:
        labels = torch.full((condition.size,), null, device=table.weight.device)
    return table(labels if dropped is None else labels.masked_fill(dropped, null))


def flow_losses(per_sample: Tensor, weights: Tensor | None) -> Losses:
    """Errors `[B]`, averaged over the batch with the samples' weights."""
    weights = torch.ones_like(per_sample) if weights is None else weights
    total = (per_sample * weights).sum() / weights.sum()
    return Losses(total=total, parts={"velocity": total.detach()})
