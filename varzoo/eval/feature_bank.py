"""All features of a set, on disk or in memory: what precision, recall and KID need and sums cannot give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.eval.moments import SampleSet

ROWS = 4096  # that are reduced at a time


class FeatureBank:
    """Features `[count, D]` in float32, every row under its global index.

    Args:
        dim: D.
        count: size of the whole set; an index beyond it is padding.
        path: a .npy file that holds them, memory-mapped; taken up if it is there. Each process needs its own. None: in
            memory.

    Raises:
        ValueError: the file holds another set.
    """

    def __init__(self, *, dim: int, count: int, path: str | Path | None = None) -> None:
        self.samples = SampleSet(count)
        if path is None:
            self._array = np.zeros((count, dim), np.float32)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        exists = path.is_file()
        self._array = np.lib.format.open_memmap(path, "r+" if exists else "w+", np.float32,
                                                None if exists else (count, dim))
        if self._array.shape != (count, dim) or self._array.dtype != np.float32:
            raise ValueError(f"{path} holds {self._array.dtype} {self._array.shape}, not float32 {(count, dim)}; "
                             "delete it "
                             "or keep features elsewhere.")

    @property
    def features(self) -> Tensor:
        """All rows, as a view."""
        return torch.from_numpy(self._array)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Keep rows `[B, D]` under their indices `[B]`; padding and what is there already are left out."""
        fresh = self.samples.fresh(index)
        self._array[index[fresh].numpy()] = features[fresh.to(features.device)].float().cpu().numpy()

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the rows of the other processes; rows that a process has not seen are zero there."""
        own = self.samples.seen
        self.samples.all_reduce(group)
        for start in range(0, len(self._array), ROWS):
            rows = torch.from_numpy(self._array[start:start + ROWS] * own[start:start + ROWS, None].numpy())
            dist.all_reduce(rows, group=group)
            self._array[start:start + ROWS] = rows.numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """Which rows are there; the rows themselves too where they are in memory."""
        if isinstance(self._array, np.memmap):
            self._array.flush()
            return {"seen": self.samples.seen.clone()}
        return {"seen": self.samples.seen.clone(), "rows": torch.from_numpy(self._array.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.seen = state["seen"].clone()
        if "rows" in state:
            self._array[:] = state["rows"].numpy()
