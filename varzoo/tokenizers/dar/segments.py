"""Which tokens and which time belong together: groups of tokens, bound to segments of the flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Progress u in [0, 1] through decoding -> the group of tokens that conditions it, and the flow's time.

    Args:
        tokens: N of an image.
        groups: number of groups G.
        group_size: tokens of a group Q; groups overlap where G Q > N.
        shift: s of the time t = u / (u + s (1 - u)); above 1 it spends more steps near the noise. Time 0 is noise.

    Half of the first segment and half of the last are no segment of their own: progress is rounded to the nearest
    group, and what is rounded beyond the last takes the last. So training shows the first group half as often as the
    others, as officially.
    """

    tokens: int
    groups: int
    group_size: int
    shift: float

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= self.tokens or not 1 <= self.groups <= self.tokens or self.shift <= 0:
            raise ValueError(f"need 1 <= group_size and groups <= tokens and a positive shift, got {self.group_size}, "
                             f"{self.groups}, {self.tokens} and {self.shift:g}.")

    def starts(self, progress: Tensor) -> Tensor:
        """First token of the group for progress `[B]` in [0, 1), int64 `[B]`."""
        nearest = torch.floor(progress * self.groups + 0.5) / self.groups * self.tokens
        return nearest.long().clamp(0, self.tokens - self.group_size)

    def times(self, progress: Tensor) -> Tensor:
        """The flow's time for progress in [0, 1]."""
        return progress / (progress + self.shift * (1 - progress))

    def plan(self, steps: int) -> tuple[list[int], list[float]]:
        """First token of each step's group, `steps` of them, and the times from 0 to 1, one more."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"decoding takes a whole number of solver steps, at least 1, got {steps!r}.")
        last = self.tokens - self.group_size
        starts = [min(last, int(math.floor(index / steps * self.groups + 0.5) / self.groups * self.tokens))
                  for index in range(steps)]
        return starts, [u / (u + self.shift * (1 - u)) for u in (index / steps for index in range(steps + 1))]
