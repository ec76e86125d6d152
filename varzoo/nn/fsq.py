"""Finite scalar quantisation (arXiv 2309.15505): every channel is rounded to one of a few levels; nothing is learned.

An id's digits are the channels' levels, the first channel's the fastest. The published code truncates a sum of floats
to get it; here it is rounded, which is the same wherever the published code is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws

_MARGIN = 1e-3  # by which the outermost levels are enlarged, so that tanh can reach them


class FSQ(nn.Module):
    """Latents `[..., C]` <-> codes `[..., C]` in [-1, 1] <-> ids `[...]`. Always float32; no entry in the state dict.

    Args:
        levels: number of levels of each channel.
        unrounded: training: share of samples whose latents are bounded but not rounded (published default 0).
        corrupted: training: the share of tokens that are replaced by random ones is drawn uniformly from this range,
            once per batch (published default 0 to 0).

    Deviation: the published code drops the rounding for a whole packed batch at once; here it is drawn per sample.
    """

    counts: Tensor
    reach: Tensor
    span: Tensor
    offset: Tensor
    shift: Tensor
    basis: Tensor

    def __init__(self, *, levels: Sequence[int], unrounded: float = 0.0,
                 corrupted: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"every channel needs at least 2 levels, got {list(levels)}.")
        if not 0 <= unrounded <= 1 or not 0 <= corrupted[0] <= corrupted[1] <= 1:
            raise ValueError(f"unrounded and corrupted are shares between 0 and 1, got {unrounded} and "
                             f"{list(corrupted)}.")
        self.levels, self.unrounded, self.corrupted = tuple(levels), unrounded, tuple(corrupted)
        counts = torch.tensor(self.levels)
        half = (counts - 1) * (1 + _MARGIN) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)  # an even number of levels has none at 0
        buffers = {"counts": counts, "reach": counts // 2, "span": half, "offset": offset,
                   "shift": torch.atanh(offset / half), "basis": torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def channels(self) -> int:
        return len(self.levels)

    @property
    def size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    def bound(self, latents: Tensor) -> Tensor:
        """Latents squeezed to where rounding gives each channel's levels, `[..., C]`."""
        return torch.tanh(latents.float() + self.shift) * self.span - self.offset

    def forward(self, latents: Tensor) -> Tensor:
        """Codes of latents; gradients pass straight through the rounding, and through the bounding as it is."""
        bounded = self.bound(latents)
        return (bounded + (bounded.round() - bounded).detach()) / self.reach

    def perturbed(self, latents: Tensor, draws: AnyDraws) -> Tensor:
        """Codes `[B, N, C]` for training: some samples not rounded, some tokens replaced, as the shares say.

        Draws: "unrounded" per sample; "corrupt_share" shared; "corrupt" and "corrupt_id" per token.
        """
        codes = self(latents)
        if self.unrounded:
            kept = draws.uniform("unrounded") < self.unrounded
            codes = torch.where(kept[:, None, None], self.bound(latents) / self.reach, codes)
        if self.corrupted[1]:
            low, high = self.corrupted
            share = low + (high - low) * draws.shared.uniform("corrupt_share")
            replaced = draws.uniform("corrupt", codes.shape[1:2]) < share
            ids = draws.integers("corrupt_id", self.size, codes.shape[1:2])
            codes = torch.where(replaced[..., None], self.codes(ids), codes)
        return codes

    def ids(self, codes: Tensor) -> Tensor:
        """Codes `[..., C]` -> ids `[...]` int64."""
        digits = (codes * self.reach + self.reach).round().long()
        return (digits * self.basis).sum(dim=-1)

    def codes(self, ids: Tensor) -> Tensor:
        """Ids `[...]` -> codes `[..., C]` float32."""
        digits = ids[..., None] // self.basis % self.counts
        return (digits - self.reach) / self.reach
