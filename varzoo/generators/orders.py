"""Orders: when each cell of a grid is drawn, and what it is predicted from.

A cell is what one slot of the cache holds: a position, or a window of positions that are fed as one. Slots count the
prefix tokens and then the cells as they are drawn, so that what is known is always the front of the cache. Raster and
1-D orders, Manhattan shells and windows differ in their order and in nothing else; visibility is one rule for training
and decoding alike, `turn[key] <= turn[query]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Work an order out on the host and for good, whatever the default device and even in inference mode.

    A tensor made in inference mode could not be used in training afterwards.
    """
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"), torch.inference_mode(False):
            return function(*args, **kwargs)
    return wrapped


@dataclass(frozen=True, eq=False)
class Reading:
    """What one head reads for a step.

    Args:
        at: `[m]` which of the tokens fed it reads.
        pick: `[m k]` the features of their k positions, in ascending order of position; None if they are so already.
        to: `[m k]` which of the step's positions they predict; None if all.
    """

    at: Tensor
    pick: Tensor | None
    to: Tensor | None


@dataclass(frozen=True, eq=False)
class Turn:
    """One step of an order, or all of it at once.

    Args:
        fed: first and last (exclusive) slot that is fed before the step.
        ids: positions whose ids those slots hold, cell by cell; empty for the prefix.
        positions: `[n]` ascending raster positions that are drawn.
        readings: what each head reads.
        share: `[n, 1]` one over the number of heads that predict a position; None if a single head predicts them all.
    """

    fed: tuple[int, int]
    ids: Tensor
    positions: Tensor
    readings: tuple[Reading, ...]
    share: Tensor | None

    def to(self, device: torch.device) -> Turn:
        move: Any = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        readings = tuple(Reading(*map(move, (reading.at, reading.pick, reading.to))) for reading in self.readings)
        return Turn(self.fed, move(self.ids), move(self.positions), readings, move(self.share))


@dataclass(frozen=True, eq=False)
class Order:
    """The order in which S cells are drawn after T prefix tokens.

    Args:
        prefix: number of prefix tokens T, which are causal.
        cells: `[S]` the cells as drawn, by their index in the raster of cells; cell i takes slot T + i.
        sizes: number of cells that each step draws.
        sources: `[heads, S]` slot from which a head predicts each cell as drawn, one of those fed just before it is
            drawn; -1 where the head does not predict it.
        positions: `[S, k]` raster positions of the ids of each cell as drawn.
    """

    prefix: int
    cells: Tensor
    sizes: tuple[int, ...]
    sources: Tensor
    positions: Tensor
    _moved: dict[torch.device, tuple[Turn, ...]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    @on_host
    def raster(cls, prefix: int, length: int) -> Order:
        """One cell per step, in raster order, each predicted from the one before."""
        cells = torch.arange(length)
        return cls(prefix, cells, (1,) * length, prefix - 1 + cells[None], cells[:, None])

    @classmethod
    @on_host
    def shells(cls, prefix: int, shape: Sequence[int]) -> Order:
        """All cells of equal Manhattan distance from the first in one step: h + w - 1 steps, or t + h + w - 2.

        There is a head per axis, the last axis first: a cell is predicted by its neighbours one step back along each
        axis, the first cell by all heads from the last prefix token.
        """
        coordinates = torch.cartesian_prod(*(torch.arange(side) for side in shape)).reshape(-1, len(shape))
        distance = coordinates.sum(dim=1)
        cells = distance.argsort(stable=True)
        slots = prefix + cells.argsort()  # of the cells in raster order
        reads = []
        for axis in reversed(range(len(shape))):
            stride = torch.Size(shape[axis + 1:]).numel()
            inside = coordinates[cells, axis] > 0
            reads.append(torch.where(inside, slots[(cells - stride).clamp(min=0)], -1))
        sources = torch.stack(reads)
        sources[:, 0] = prefix - 1
        return cls(prefix, cells, tuple(distance.bincount().tolist()), sources, cells[:, None])

    @on_host
    def windows(self, shape: Sequence[int], side: int) -> Order:
        """The same order of cells, where each is a `side` x `side` window of a grid `shape` = (h, w) of positions."""
        grid = torch.arange(torch.Size(shape).numel()).view(shape[0] // side, side, shape[1] // side, side)
        return replace(self, positions=grid.transpose(1, 2).reshape(-1, side * side)[self.cells])

    @cached_property
    @on_host
    def turn(self) -> Tensor:
        """`[T + S]` when each slot becomes known."""
        steps = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        return torch.cat([torch.arange(self.prefix), self.prefix + steps])

    def visible(self, length: int) -> Tensor | None:
        """Which of the first `length` slots each of them sees, `[length, length]`; None if plainly causal."""
        turn = self.turn[:length]
        return None if (turn.diff() > 0).all() else turn <= turn[:, None]

    @cached_property
    @on_host
    def steps(self) -> tuple[Turn, ...]:
        bounds = [-self.prefix, *torch.tensor((0, *self.sizes)).cumsum(0).tolist()]
        fed = list(pairwise(bounds))
        return tuple(self._turn(before, now) for before, now in pairwise(fed))

    @cached_property
    @on_host
    def everything(self) -> Turn:
        """All cells in one step, as teacher forcing predicts them: all but the last step's are fed."""
        count = len(self.cells)
        return self._turn((-self.prefix, count - self.sizes[-1]), (0, count))

    @on_host
    def on(self, device: torch.device) -> tuple[Turn, ...]:
        """The steps, their indices on a device; moved there once."""
        if device not in self._moved:
            self._moved[device] = tuple(turn.to(device) for turn in self.steps)
        return self._moved[device]

    def _turn(self, fed: tuple[int, int], drawn: tuple[int, int]) -> Turn:
        """The turn that draws some cells after some were fed, both given as first and last cell (prefix: below 0)."""
        start = self.prefix + fed[0]
        targets = self.positions[slice(*drawn)]
        positions = targets.flatten().sort().values
        readings, count = [], torch.zeros(len(positions))
        for sources in self.sources[:, slice(*drawn)]:
            known = sources >= 0
            to, pick = torch.searchsorted(positions, targets[known].flatten()).sort()
            count[to] += 1
            in_order = torch.equal(pick, torch.arange(len(pick)))
            readings.append(Reading(at=sources[known] - start, pick=None if in_order else pick,
                                    to=to if len(to) < len(positions) else None))
        return Turn(fed=(start, self.prefix + fed[1]), ids=self.positions[max(fed[0], 0):max(fed[1], 0)].flatten(),
                    positions=positions, readings=tuple(readings),
                    share=None if len(readings) == 1 else 1 / count[:, None])
