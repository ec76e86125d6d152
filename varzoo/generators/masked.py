"""Masked generation: tokens appear in a random order, few at first, many at the end (MaskGIT, arXiv 2202.04200, 3.2).

An order `[B, n]` lists positions from the last drawn to the first: those still masked after a step are its first `left`
entries. So a plan with fewer steps only cuts the same order elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

from varzoo.core.draws import AnyDraws
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


@dataclass(frozen=True, kw_only=True)
class ConfidencePlan(MaskPlan):
    """A plan of generators that keep, of all they draw in a step, what they are surest of.

    Args:
        steps, law: see `MaskPlan`.
        noise: scale of Gumbel noise on confidences, falling to 0 at the last step.
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"the noise on confidences must be at least 0, got {self.noise:g}.")


@dataclass(frozen=True, kw_only=True)
class TruncatedNormalRate:
    """Share of tokens that a training step masks: normal around 1, restricted to [low, 1] (arXiv 2406.11838, 4)."""

    low: float
    std: float = 0.25

    def __call__(self, draws: AnyDraws, name: str) -> float:
        return draws.shared.truncated_normal(name, mean=1.0, std=self.std, low=self.low, high=1.0).item()


@dataclass(frozen=True)
class CosineRate:
    """Share of tokens that a training step masks: cos(pi/2 u) for a uniform u."""

    def __call__(self, draws: AnyDraws, name: str) -> float:
        return math.cos(math.pi / 2 * draws.shared.uniform(name).item())


MaskRate = TruncatedNormalRate | CosineRate


def split_order(order: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The masked positions (the first of `order` `[B, n]`, a share `rate` of them, rounded up) and the visible ones.

    Both ascend.
    """
    masked, visible = order.tensor_split([math.ceil(order.shape[1] * rate)], dim=1)
    return masked.sort(dim=1).values, visible.sort(dim=1).values


def known_positions(known: Tensor) -> Tensor:
    """Ascending positions `[B, V]` where `known` `[B, N]` holds, as many for every sample."""
    counts = known.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"samples of a batch must have equally many known tokens, got {counts.tolist()}.")
    return known.nonzero()[:, 1].view(len(known), -1)


Plan = TypeVar("Plan", bound=MaskPlan)


def require_plan(plan: object, kind: type[Plan], system: str, length: int) -> Plan:
    """The plan, if it is of the kind. Raises ValueError saying how to give one.

    A plan that says more than the kind does is refused too: the generator would not look at it.
    """
    if isinstance(plan, kind) and len(fields(plan)) == len(fields(kind)):
        return plan
    raise ValueError(f"{system} leaves the number of steps open: give plan={kind.__name__}(steps=...), between 1 and "
                     f"{length} of them, got {plan!r}.")


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
