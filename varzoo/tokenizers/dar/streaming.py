"""Decoding while tokens arrive: every finished group is one solver step further."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varzoo.tokenizers.base import Stream

if TYPE_CHECKING:
    from varzoo.tokenizers.dar.tokenizer import DARTokenizer


class GroupStream(Stream):
    """The state of one batch of images being decoded.

    A solver step is taken as soon as the tokens that condition it are there, however they are pushed, and its contexts
    are computed in pieces that the plan alone decides: so the image is the same to the last bit whatever came when.

    Args:
        tokenizer: what decodes.
        noise: `[B, 3, H, W]`, standard normal.
        steps: solver steps in all.
        order: 1 is Euler's method; 2 Adams-Bashforth's, with the coefficients of a uniform grid, as officially.

    Attributes:
        done: solver steps that were taken.
    """

    def __init__(self, tokenizer: DARTokenizer, noise: Tensor, *, steps: int, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"the solver's order is 1 (Euler) or 2 (Adams-Bashforth), got {order!r}.")
        self.tokenizer, self.order, self.done = tokenizer, order, 0
        self._starts, self._times = tokenizer.segments.plan(steps)
        self._ids = torch.empty(len(noise), 0, dtype=torch.int64, device=noise.device)
        self._contexts: list[Tensor] = []
        self._cache = tokenizer.contexts.new_cache(len(noise))
        self._sample = self._before = noise
        self._velocity: Tensor | None = None
        self._slope: Tensor | None = None

    @property
    def steps(self) -> int:
        """Solver steps in all."""
        return len(self._starts)

    @torch.no_grad()
    def push(self, ids: Tensor) -> int:
        """Take the next ids `[B, n]`, any number, and every solver step that they allow; returns how many.

        Raises:
            ValueError: an id is not in the codebook, or there are more than the tokens of an image.
        """
        spec, before = self.tokenizer.spec, self.done
        if ids.shape[1] + self._ids.shape[1] > spec.length:
            raise ValueError(f"an image has {spec.length} tokens, but {self._ids.shape[1]} + {ids.shape[1]} were "
                             "pushed.")
        self.tokenizer.require_ids(ids)
        self._ids = torch.cat([self._ids, ids], dim=1)
        while self.done < self.steps:
            start = self._starts[self.done]
            end = start + self.tokenizer.segments.group_size
            if end > self._ids.shape[1]:
                break
            self._step(self._contexts_until(end)[:, start:end])
        return self.done - before

    def preview(self) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped: the last step taken, prolonged to the end; the image itself after all.

        Raises:
            ValueError: no group is complete yet.
        """
        if self._slope is None:
            raise ValueError(f"there is nothing to see before the first {self.tokenizer.segments.group_size} tokens, "
                             f"which condition the first step; {self._ids.shape[1]} are there.")
        jump = 1 - self._times[self.done - 1]
        return (self._before + jump * self._slope) / self.tokenizer.data_std

    def _contexts_until(self, end: int) -> Tensor:
        known = sum(part.shape[1] for part in self._contexts)
        if known < end:
            codes = self.tokenizer.lookup(self._ids[:, known:end])
            self._contexts.append(self.tokenizer.contexts.extended(codes, self._cache))
        return torch.cat(self._contexts, dim=1)

    def _step(self, contexts: Tensor) -> None:
        time, after = self._times[self.done:self.done + 2]
        times = self._sample.new_full((len(self._sample),), time)
        velocity, _ = self.tokenizer.network(self._sample, times, contexts)
        self._slope = velocity
        if self.order == 2 and self._velocity is not None:
            self._slope = 1.5 * velocity - 0.5 * self._velocity
        self._before, self._velocity = self._sample, velocity
        self._sample = self._sample + (after - time) * self._slope
        self.done += 1
