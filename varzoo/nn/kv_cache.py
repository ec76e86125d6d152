"""A preallocated key-value cache: an explicit argument of the model, never state of a module."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, `[layers, B, heads, slots, head_dim]`.

    Args:
        layers, batch, heads, slots, head_dim: sizes.
        dtype, device: of the stored tensors.

    Attributes:
        slots: number of slots.
        reach: attention reads slots 0 .. reach - 1; the decoding sets it before it feeds. Kept at `slots`, every call
            has the same shapes, as compilation wants; raised step by step, eager decoding reads only what is there.
    """

    def __init__(self, *, layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype,
                 device: torch.device | str) -> None:
        self.keys = torch.zeros(layers, batch, heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.slots = self.reach = slots

    def update(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values `[B, heads, n, head_dim]` at `slots`, `[n]` or, where samples differ, `[B, n]`.

        Returns:
            All that attention may read.
        """
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if slots.ndim == 1:
                stored.index_copy_(2, slots, new.to(stored.dtype))
            else:
                stored.scatter_(2, slots[:, None, :, None].expand_as(new), new.to(stored.dtype))
        return self.keys[layer, :, :, :self.reach], self.values[layer, :, :, :self.reach]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy what is at slots `source` `[B, n]` to slots `target` `[B, n]`, in all layers."""
        for stored in (self.keys, self.values):
            index = [slots[None, :, None, :, None].expand(len(stored), -1, stored.shape[2], -1, stored.shape[-1])
                     for slots in (source, target)]
            stored.scatter_(3, index[1], stored.gather(3, index[0]))

    def first(self, batch: int) -> KVCache:
        """The first samples' part of this cache, in the same memory (the conditional half of a guided batch)."""
        part = copy(self)
        part.keys, part.values = self.keys[:, :batch], self.values[:, :batch]
        return part
