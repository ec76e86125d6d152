"""The nearest codes of every code, computed once per codebook and kept on disk under the codebook's hash."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varzoo.core.checkpoint import atomic_path, weights_hash

ROWS = 1024  # of the distance matrix at a time


def neighbour_table(codebook: Tensor, count: int | None = None) -> Tensor:
    """The other codes by increasing Euclidean distance, the code itself left out.

    Args:
        codebook: `[V, C]`, as stored: LANTERN does not normalise it even where the tokenizer does (arXiv 2410.03355).
        count: how many; V - 1 by default.

    Returns:
        `[V, count]` int64; of equally near codes the lower id comes first.

    Raises:
        ValueError: there are not that many other codes.
    """
    size = len(codebook)
    count = size - 1 if count is None else count
    if not 1 <= count <= size - 1:
        raise ValueError(f"a codebook of {size} codes has 1 to {size - 1} neighbours of each, not {count}: lower k.")
    codebook, rows = codebook.detach().float(), []
    for start in range(0, size, ROWS):
        distances = torch.cdist(codebook[start:start + ROWS], codebook,
                                compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.arange(len(distances), device=codebook.device)
        distances[itself, itself + start] = torch.inf
        rows.append(distances.argsort(dim=1, stable=True)[:, :count])
    return torch.cat(rows)


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varzoo" / "neighbours"


def cached_table(codebook: Tensor, count: int, folder: str | Path | None = None) -> Tensor:
    """`neighbour_table`, from the file that an earlier call left in the folder, or computed and left there.

    Raises:
        ValueError: see `neighbour_table`; or the file is damaged.
    """
    path = Path(folder or default_folder()) / f"{weights_hash({'codebook': codebook})}_{count}.npy"
    if not path.exists():
        table = neighbour_table(codebook, count)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, table.cpu().numpy().astype(np.min_scalar_type(len(codebook) - 1)))
        return table
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is computed again.") from error
    if table.shape != (len(codebook), count):
        raise ValueError(f"{path} holds a table {table.shape}, expected {(len(codebook), count)}: delete it.")
    return torch.from_numpy(table.astype(np.int64)).to(codebook.device)
