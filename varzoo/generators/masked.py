"""Masked generation: tokens appear in a random order, few at first, many at the end (MaskGIT, arXiv 2202.04200, 3.2).

An order `[B, n]` lists positions from the last drawn to the first: those still masked after a step are its first `left`
entries. So a plan with fewer steps only cuts the same order elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from varzoo.core.steps import Step


def cosine(done: int, of: int) -> float:
    """Share of tokens still masked after `done` of `of` steps: cos(pi/2 done/of)."""
    return math.cos(math.pi / 2 * done / of)  # in this order: floors of its multiples are published step sizes


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """How many steps a masked generation takes, and how many tokens are masked after each.

    Args:
        steps: number of AR steps; with more steps than tokens, those that would draw nothing are skipped.
        law: (steps done, steps in all) -> share of tokens still masked.
    """

    steps: int
    law: Callable[[int, int], float] = cosine

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a mask plan needs at least 1 step, got {self.steps}.")

    def left(self, index: int, masked: int, total: int) -> int:
        """MAR's `mask_len` of a step that starts with `masked` tokens: at least one is drawn, at least one left."""
        return max(1, min(masked - 1, math.floor(total * self.law(index + 1, self.steps))))


def masked_steps(plan: MaskPlan, order: Tensor, *, phase: str = "main") -> Iterator[Step]:
    """The steps that draw the positions of `order` `[B, n]`, whose end comes first.

    The last step draws all that is left while its `Step.left` says 1, as the official code has it: linear guidance
    therefore never quite reaches its scale.
    """
    masked = total = order.shape[1]
    for index in range(plan.steps):
        left = plan.left(index, masked, total)
        keep = left if index < plan.steps - 1 else 0
        if keep < masked:
            yield Step(index=index, of=plan.steps, positions=order[:, keep:masked].sort(dim=1).values,
                       drawn=total - masked, left=left, total=total, phase=phase)
        masked = keep
