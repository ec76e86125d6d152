"""One process, or one of many under a launcher such as torchrun: the same command for both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's place among the others.

    Attributes:
        rank, world_size: which of how many.
        device: its own.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def many(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.many:
            dist.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the launcher's other processes, if there are any, and leave them at the end.

    Raises:
        ValueError: there is no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but this machine has no such device; say device=cpu.")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Processes(device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
