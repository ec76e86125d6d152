"""A tokenizer's code vectors as a generator uses them: looked up by level, summed, and found again for a sum.

Tables are `[1, K, C]` where all levels share one, else `[D, K, C]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varzoo.nn.codebook import squared_distances


def code_tables(codebook: Tensor, *, size: int, channels: int, levels: int) -> Tensor:
    """The tables of a tokenizer's codebook, `[K, C]` or `[D, K, C]`.

    Raises:
        ValueError: they are not of `size` codes of `channels` each, one table or one for each of the levels.
    """
    tables = codebook.unflatten(0, (-1, size)) if codebook.ndim == 2 and len(codebook) % size == 0 else codebook
    if tables.ndim != 3 or tables.shape[1:] != (size, channels) or len(tables) not in (1, levels):
        raise ValueError(f"this generator embeds {size} codes of {channels} channels, one codebook or one for each of "
                         f"{levels} levels; the tokenizer has {list(codebook.shape)}: set code_channels, or choose its "
                         "tokenizer.")
    return tables.detach().clone()


def require_tables(tables: Tensor | None) -> Tensor:
    """The tables, if there are any. Raises ValueError saying how a generator gets them."""
    if tables is None:
        raise ValueError("this generator embeds codes by its tokenizer's code vectors and has none yet: compose the "
                         "two, as Model(...) does, or call generator.use_codebook(tokenizer.codebook()).")
    return tables


def look_up(tables: Tensor, ids: Tensor) -> Tensor:
    """Vectors `[..., d, C]` of ids `[..., d]` of the first d levels."""
    if len(tables) > 1:
        ids = ids + tables.shape[1] * torch.arange(ids.shape[-1], device=ids.device)
    return F.embedding(ids, tables.flatten(0, 1))


def sum_levels(tables: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """The sum `[..., C]` of the vectors of ids `[..., D]` at the levels where `chosen` `[..., D]` holds."""
    return (look_up(tables, ids) * chosen[..., None]).sum(dim=-2)


def requantise(tables: Tensor, vectors: Tensor, ids: Tensor, visible: Tensor) -> Tensor:
    """Ids `[..., D]`: the first `visible` `[...]` of each stack as given, the deeper ones those of a vector.

    Vectors `[..., C]` stand for the sum of what is not visible. From the first level that is not on, each level takes
    the code nearest to what is left of the vector, which need not be the one that it was summed from.
    """
    ids, left = ids.clone(), vectors
    for level in range(ids.shape[-1]):
        deeper = visible <= level
        table = tables[min(level, len(tables) - 1)].to(left.dtype)
        nearest = squared_distances(left[deeper], table).argmin(dim=-1)
        ids[..., level][deeper] = nearest
        left = left.masked_scatter(deeper[..., None], left[deeper] - table[nearest])
    return ids
