"""Step: one turn of a decoding, and schedules: values that depend on it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from varzoo.core.errors import unknown


@dataclass(frozen=True, kw_only=True)
class Step:
    """One AR step of a decoding.

    Attributes:
        index: 0-based index of the step in its phase.
        of: number of steps planned in the phase.
        positions: `[B, n]` int64, ascending raster positions drawn in this step.
        drawn: tokens per sample that were drawn before this step.
        left: tokens per sample still to draw after it; the MAR family's official rule never lets it fall below 1.
        total: tokens per sample that the phase draws in all.
        phase: name of the phase, for generators that have several (Hi-MAR: "pivot", then "dense").
    """

    index: int
    of: int
    positions: Tensor
    drawn: int
    left: int
    total: int
    phase: str = "main"


class Schedule(ABC):
    """A value that depends on the step: guidance scale, temperature, solver steps."""

    @abstractmethod
    def __call__(self, step: Step) -> float: ...


@dataclass(frozen=True)
class Constant(Schedule):
    """The same `scale` at every step."""

    scale: float

    def __call__(self, step: Step) -> float:
        return self.scale


@dataclass(frozen=True)
class LinearInTokens(Schedule):
    """From 1 towards `scale`, linear in the share of tokens drawn: 1 + (scale - 1) (total - left) / total (MAR)."""

    scale: float

    def __call__(self, step: Step) -> float:
        return 1 + (self.scale - 1) * (step.total - step.left) / step.total


@dataclass(frozen=True)
class LinearInSteps(Schedule):
    """From 1 at the first step to `scale` at the last, linear in the steps (xAR, FlowAR); a single step takes `scale`.
    """

    scale: float

    def __call__(self, step: Step) -> float:
        return self.scale if step.of == 1 else 1 + (self.scale - 1) * step.index / (step.of - 1)


@dataclass(frozen=True)
class FirstSteps(Schedule):
    """`scale` up to step `last` inclusive, 1 afterwards (LlamaGen's `cfg_interval` k is `last = k + 1`)."""

    scale: float
    last: int

    def __call__(self, step: Step) -> float:
        return self.scale if step.index <= self.last else 1.0


@dataclass(frozen=True)
class FirstTokens(Schedule):
    """`scale` as long as at most `last` tokens are drawn, 1 afterwards (NAR's `cfg_interval`)."""

    scale: float
    last: int

    def __call__(self, step: Step) -> float:
        return self.scale if step.drawn <= self.last else 1.0


@dataclass(frozen=True)
class Linspace(Schedule):
    """From `first` at the first token to `scale` at the last, linear in the tokens drawn (D-AR's "first,scale").

    A first value of exactly 1 becomes 1.001 where the last is larger, as officially.
    """

    first: float
    scale: float

    def __call__(self, step: Step) -> float:
        first = 1.001 if self.first == 1 < self.scale else self.first
        return first + (self.scale - first) * step.drawn / max(step.total - 1, 1)


@dataclass(frozen=True)
class Ramp(Schedule):
    """From 1 at the first step, linearly to `scale` at the share `until` of the steps, then constant.

    Token-Shuffle's half-linear guidance is `until` = 0.5, its linear one 1.
    """

    scale: float
    until: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"a ramp ends at a share of the steps in (0, 1], got until={self.until}.")

    def __call__(self, step: Step) -> float:
        return 1 + (self.scale - 1) * min(1.0, step.index / (self.until * step.of))


RISES = {
    # name: share r of the steps that are done after this one, and before it -> share of the way from 1 to the scale
    "linear": lambda after, before: after,
    "constant": lambda after, before: 1.0,
    "cos": lambda after, before: math.cos(math.pi * (after - 1) / 2),
    "log": lambda after, before: math.log1p(after * (math.e - 1)),
    "square": lambda after, before: after**2,
    "square_root": lambda after, before: math.sqrt(before),
}


@dataclass(frozen=True)
class Rise(Schedule):
    """From about 1 to `scale` along a law of the steps (ELM, arXiv 2410.16257).

    Args:
        scale: at the last step; "square_root" alone stops short of it, and begins at 1.
        law: "linear", "constant", "cos", "log", "square" or "square_root".
    """

    scale: float
    law: str = "linear"

    def __post_init__(self) -> None:
        if self.law not in RISES:
            raise unknown("law of guidance", self.law, RISES)

    def __call__(self, step: Step) -> float:
        return 1 + (self.scale - 1) * RISES[self.law]((step.index + 1) / step.of, step.index / step.of)


ANNEALING = {
    # name: (step index s, last index n) -> numerator and denominator of the share of the annealed steps that is kept
    "linear": lambda s, n: (n - s, n),
    "cosine": lambda s, n: (math.cos(math.pi * s / n) + 1, 2),
    "two_stage": lambda s, n: (int(s < n / 2), 1),
    "constant": lambda s, n: (0, 1),
}
ROUNDING = {
    # whose official code: (numerator, denominator, upper - lower, lower) -> steps; they differ by one here and there
    "mar": lambda a, b, range_, lower: lower + int(a / b * range_),
    "xar": lambda a, b, range_, lower: int(a / b * range_ + lower),
    "flowar": lambda a, b, range_, lower: int(range_ * a / b + lower),
}


@dataclass(frozen=True)
class Anneal(Schedule):
    """Solver steps that fall from `upper` at the first AR step to `lower` at the last (DiSA, arXiv 2505.20297).

    Args:
        upper, lower: numbers of solver steps, upper >= lower >= 1; a single AR step takes `upper`.
        law: "linear", "cosine", "two_stage" (`upper` in the first half) or, as officially, "constant": always `lower`.
        rounding: whose official expression rounds: "mar" (Harmon and Hi-MAR too), "xar" or "flowar".
    """

    upper: int
    lower: int
    law: str = "linear"
    rounding: str = "mar"

    def __post_init__(self) -> None:
        if not 1 <= self.lower <= self.upper:
            raise ValueError(f"annealing goes from upper down to lower >= 1, got {self.upper} and {self.lower}.")
        if self.law not in ANNEALING:
            raise unknown("annealing law", self.law, ANNEALING)
        if self.rounding not in ROUNDING:
            raise unknown("rounding", self.rounding, ROUNDING)

    def __call__(self, step: Step) -> int:
        if step.of == 1:
            return self.upper
        share = ANNEALING[self.law](step.index, step.of - 1)
        return ROUNDING[self.rounding](*share, self.upper - self.lower, self.lower)


def at_step(value: Any, step: Step) -> Any:
    """The value of an option at a step: schedules are evaluated, everything else is returned as it is."""
    return value(step) if isinstance(value, Schedule) else value


def of_phase(setting: Any, phase: str = "main", phases: Collection[str] = ("main",)) -> Any:
    """What a setting (guidance, plan) says for one phase; it is given once for all phases, or as a mapping by phase.

    Args:
        setting: the setting.
        phase: the phase that is asked for.
        phases: all phases of the generator.

    Raises:
        ValueError: the setting is per phase, but not for exactly these phases.
    """
    if not isinstance(setting, Mapping):
        return setting
    for name in setting:
        if name not in phases:
            raise unknown("phase", name, phases)
    missing = [name for name in phases if name not in setting]
    if missing:
        raise ValueError(f"a setting per phase needs all of {', '.join(phases)}; there is none for {missing[0]!r}.")
    return setting[phase]


def options_of_phase(options: Mapping[str, Any], phase: str = "main",
                     phases: Collection[str] = ("main",)) -> Mapping[str, Any]:
    """The options of one phase, of options that are given once for all phases, or as a mapping of options by phase.

    Raises:
        ValueError: they are per phase, but not for exactly these phases.
    """
    per_phase = any(isinstance(value, Mapping) for value in options.values())
    return of_phase(options, phase, phases) if per_phase else options


def with_scale(guidance: Schedule | Mapping[str, Schedule], scale: float) -> Schedule | dict[str, Schedule]:
    """The same law of guidance towards another scale, in every phase."""
    if isinstance(guidance, Mapping):
        return {phase: _rescaled(schedule, scale) for phase, schedule in guidance.items()}
    return _rescaled(guidance, scale)


def _rescaled(schedule: Any, scale: float) -> Schedule:
    """A schedule (a dataclass with a `scale`) at another scale."""
    return replace(schedule, scale=scale)


def needs_null_branch(guidance: Schedule | None, steps: Iterable[Step]) -> bool:
    """Whether any step is guided.

    Raises:
        ValueError: the guidance is no schedule, or a scale is below 1, which would push away from the condition.
    """
    if guidance is None:
        return False
    if not isinstance(guidance, Schedule):
        raise unknown("guidance schedule", guidance, (kind.__name__ for kind in Schedule.__subclasses__()))
    scales = [guidance(step) for step in steps]
    if min(scales) < 1 or not all(map(math.isfinite, scales)):
        raise ValueError(
            f"guidance scale {min(scales):g} is below 1 or not finite; use 1 for no guidance, more than 1 to guide."
        )
    return any(scale != 1 for scale in scales)
