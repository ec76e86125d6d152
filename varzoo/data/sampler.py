"""Which images a training step sees: a function of the step, so that resuming and sharding change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from varzoo.core.draws import Draws


class Example(NamedTuple):
    """The key of one training example: which image, and at which iteration its augmentation is drawn."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which keys do not need
    iteration: int = 0


class StepBatchSampler(Sampler[list[Example]]):
    """Endless batches by step: the batch of step s depends on (length, batch size, seed, s) alone.

    All epochs form one endless sequence, each epoch a permutation of its own; step s takes the s-th piece of
    `batch_size` images (a piece may reach over the end of an epoch, none is dropped or repeated), and rank r the r-th
    of `world_size` equal parts of the piece. A run is therefore resumed by its step number.

    Args:
        length: images in the data set.
        batch_size: images per step over all ranks together, a multiple of `world_size`.
        seed: the run's seed.
        rank: this process among `world_size`.
        world_size: how many processes share each batch.
        start_step: the step that iteration begins at; may be set anew before iterating.
        shuffle: without it, every epoch is in data set order.
    """

    def __init__(self, *, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1,
                 start_step: int = 0, shuffle: bool = True) -> None:
        if length < 1 or batch_size < 1 or start_step < 0:
            raise ValueError(f"length and batch_size must be positive and start_step not negative, got {length}, "
                             f"{batch_size} and {start_step}.")
        if batch_size % world_size:
            raise ValueError(f"the global batch size {batch_size} cannot be shared equally by {world_size} processes; "
                             f"choose a multiple of {world_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. {world_size - 1}, got {rank}.")
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self._orders: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[list[Example]]:
        step = self.start_step
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> list[Example]:
        """This rank's examples of a step, `batch_size / world_size` of them."""
        local = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * local
        return [Example(self._index(position), step) for position in range(first, first + local)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return place
        if epoch not in self._orders:
            order = Draws(self.seed, (epoch,)).permutation("epoch_order", self.length)[0]
            kept = [(number, self._orders[number]) for number in self._orders if number == epoch - 1]
            self._orders = {**dict(kept), epoch: order.to(torch.int32)}  # a batch may touch two epochs
        return int(self._orders[epoch][place])
