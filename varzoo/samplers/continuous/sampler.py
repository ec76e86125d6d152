"""Continuous speculative decoding (CSpD, arXiv 2411.11925): a small masked generator drafts, a large one judges.

Official code: MarkXCloud/CSpD. `ContinuousSpeculative` does what it does, which is not what the paper derives: the
target predicts all drafted tokens at once from the verified ones alone, every token is judged by itself, and nothing is
dropped. `PrefixSpeculative` is the paper's order: the target sees earlier drafts, and what follows a rejected step is
drafted anew. Neither is exact: the last step of DDPM adds no noise, so a draft is its density's mean, no sample of it.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.steps import Step, at_step
from varzoo.generators.base import Condition, Decoding, Generator
from varzoo.nn.diffusion import Diffusion
from varzoo.nn.rows import put_rows, take_rows
from varzoo.nn.solvers import Density
from varzoo.predictions.base import Drawn
from varzoo.samplers.base import Callback, Counts, GuidanceSetting, Progress, Sampled, Sampler, check_options
from varzoo.samplers.continuous.acceptance import Acceptance, Replacements


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A step of the plan: who draws its tokens, and whether what was drafted is verified after it."""

    step: Step
    drafts: bool
    verifies: bool


def turns(steps: Sequence[Step], *, prefill: float, length: int) -> list[Turn]:
    """Who does what: the target draws steps up to the share `prefill`, then every `length`-th step verifies.

    Steps are counted absolutely, so the first block may be shorter; the last step always verifies. A step that would
    draw nothing is not among `steps`; where it is one that verifies, the step before it does.
    """
    found = []
    for step, following in zip(steps, [*steps[1:], None]):
        drafts = step.index > step.of * prefill
        until = step.of if following is None else following.index
        due = following is None or any(index % length == 0 for index in range(max(step.index, 1), until))
        found.append(Turn(step=step, drafts=drafts, verifies=drafts and due))
    return found


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What one verification found at positions `[B, n]`.

    Attributes:
        positions: raster positions, ascending.
        draft, target: densities `[B, n, C]`.
        log_ratio: `[B, n]`, see `Acceptance.log_ratio`.
        accepted: `[B, n]`.
        replacements: what was drawn for the others.
        tokens: `[B, n, C]` the outcome.
    """

    positions: Tensor
    draft: Density
    target: Density
    log_ratio: Tensor
    accepted: Tensor
    replacements: Replacements
    tokens: Tensor


class Speculation:
    """One batch being drawn by two decodings that share order and noise.

    Attributes:
        steps: of the plan.
        drafting, target: the decodings; the target's knows what was verified alone.
        draft_evaluations, target_evaluations, head_evaluations: calls of the networks so far.
        verifications, tested, accepted: summed over samples.
    """

    def __init__(self, sampler: MaskedSpeculative, generator: Generator, condition: Condition,
                 draws: AnyDraws) -> None:
        self.acceptance, self.options, self.draws = sampler.acceptance, sampler.draw, draws
        begin = {"draws": draws, "guidance": sampler.guidance, "plan": sampler.plan}
        self.target: Decoding = generator.begin(condition, **begin)
        self.drafting: Decoding = sampler.draft.begin(condition, **begin)
        self.steps = list(self.target.steps)
        self.drafted: list[Step] = []
        blank = torch.zeros_like(self.target.tokens)
        self._density = Density(mean=blank, std=blank, log_std_sum=blank)  # of what is drafted, by position
        self._at: dict[str, Any] = {}
        self.draft_evaluations, self.target_evaluations, self.head_evaluations = 0, 0, 0
        self.verifications, self.tested, self.accepted = 0, 0, 0

    def prefill(self, step: Step) -> None:
        """The target draws a step, as the plain sampler would."""
        self._new_block(step)
        self.settle(step, self._drawn_by_target(step).tokens)

    def draft(self, step: Step) -> None:
        """The draft draws a step, given all that is drawn, verified or not."""
        if not self.drafted:
            self._new_block(step)
        drawn = self.drafting.predict(step).draw(self.draws, **self._at)
        self.drafting.commit(step, drawn.tokens)
        self.draft_evaluations += 1
        self._density = _put(self._density, step.positions, _density_of(drawn))
        self.drafted.append(step)

    def verify(self, step: Step) -> Verification:
        """Judge the tokens at a step's positions `[B, n]`, which the target predicts without seeing them."""
        draft, target = _take(self._density, step.positions), _density_of(self._drawn_by_target(step))
        x, at = take_rows(self.drafting.tokens, step.positions), step.positions
        log_ratio = self.acceptance.log_ratio(x, draft, target)
        accepted = log_ratio.exp() > self.draws.uniform("accept", at=at)
        size = x.shape[-1:]
        replacements = self.acceptance.replacements(draft, target, ~accepted, lambda k: (
            self.draws.normal("proposal", size, at=at, round=k), self.draws.uniform("keep_proposal", at=at, round=k)))
        tokens = torch.where(accepted[..., None], x, replacements.tokens)
        self.settle(step, tokens)
        self.verifications += len(x)
        self.tested += accepted.numel()
        self.accepted += int(accepted.sum())
        return Verification(positions=at, draft=draft, target=target, log_ratio=log_ratio, accepted=accepted,
                            replacements=replacements, tokens=tokens)

    def settle(self, step: Step, tokens: Tensor) -> None:
        """Both decodings know what was drawn or verified."""
        self.target.commit(step, tokens)
        self.drafting.commit(step, tokens)

    def block(self) -> Step:
        """The drafted steps as one, with the last of them's place in the plan."""
        positions = torch.cat([step.positions for step in self.drafted], dim=1).sort(dim=1).values
        first, last = self.drafted[0], self.drafted[-1]
        return replace(last, positions=positions, drawn=first.drawn)

    def _new_block(self, step: Step) -> None:
        """Options at a step, for a whole block: both models must denoise by the same solver steps."""
        self._at = {name: at_step(value, step) for name, value in self.options.items()}

    def _drawn_by_target(self, step: Step) -> Drawn:
        drawn = self.target.predict(step).draw(self.draws, **self._at)
        self.target_evaluations += 1
        self.head_evaluations += drawn.evaluations
        return drawn


def _density_of(drawn: Drawn) -> Density:
    assert drawn.density is not None, "a sampler that judges densities refuses solvers without"
    return drawn.density


def _take(density: Density, positions: Tensor) -> Density:
    return Density(mean=take_rows(density.mean, positions), std=take_rows(density.std, positions),
                   log_std_sum=take_rows(density.log_std_sum, positions))


def _put(density: Density, positions: Tensor, rows: Density) -> Density:
    return Density(mean=put_rows(density.mean, positions, rows.mean), std=put_rows(density.std, positions, rows.std),
                   log_std_sum=put_rows(density.log_std_sum, positions, rows.log_std_sum))


@runtime_checkable
class Diffuses(Protocol):
    """What generators are that offer densities."""

    process: Diffusion


class MaskedSpeculative(Sampler):
    """Base of both orders of verification.

    Args:
        draft: a smaller generator of the same tokens, process and classes.
        length: drafted steps per verification.
        prefill: share of the steps that the target draws at first; 0 is still one step.
        acceptance: the test and the replacement.
        guidance: scale of classifier-free guidance per step, for both models.
        plan: number of steps and mask law.
        draw: options of the predictions' `draw`, for both models; a Schedule (DiSA) is evaluated once per block, at its
            first step, since densities compare only along the same solver steps.
    """

    needs = frozenset({"densities"})

    def __init__(self, *, draft: Generator, length: int, prefill: float, acceptance: Acceptance,
                 guidance: GuidanceSetting = None, plan: Any = None, draw: Mapping[str, Any] | None = None) -> None:
        if length < 1 or not 0 <= prefill < 1:
            raise ValueError(f"need length >= 1 and 0 <= prefill < 1, got {length} and {prefill:g}.")
        self.draft, self.length, self.prefill, self.acceptance = draft.eval(), length, prefill, acceptance
        self.guidance, self.plan, self.draw = guidance, plan, dict(draw or {})
        solver, temperature = self.draw.get("solver"), self.draw.get("temperature", 1.0)
        if (solver is not None and not solver.has_density) or temperature == 0:
            what = "at temperature 0" if temperature == 0 else f"drawn by {type(solver).__name__}"
            raise ValueError(f"a token {what} has no density to judge a draft by: choose the solver DDPM and a "
                             "temperature above 0.")

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.draft,)

    def check(self, generator: Generator) -> None:
        super().check(generator)
        super().check(self.draft)
        check_options(self.draw, generator)
        generator.check_plan(self.plan)
        assert isinstance(self.draft, Diffuses) and isinstance(generator, Diffuses)  # they offer densities
        betas = self.draft.process.betas, generator.process.betas
        for what, ours, theirs in (("tokens", self.draft.spec, generator.spec),
                                   ("number of classes", self.draft.num_classes, generator.num_classes),
                                   ("noise schedule", *(tuple(schedule) for schedule in betas))):
            if ours != theirs:
                values = f": {ours} and {theirs}" if what != "noise schedule" else ""
                raise ValueError(f"draft and target differ in {what}{values}. Draft with a generator trained on the "
                                 "same tokenizer, classes and noise schedule.")

    @abstractmethod
    def run(self, speculation: Speculation, callback: Callback | None) -> None:
        """Draw everything."""

    def sample(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None = None) -> Sampled:
        self.check(generator)
        return self._drawn(generator, condition, draws, callback)

    @torch.no_grad()
    def _drawn(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None) -> Sampled:
        start = time.perf_counter()
        speculation = Speculation(self, generator, condition, draws)
        self.run(speculation, callback)
        return Sampled(tokens=speculation.target.tokens, counts=Counts(
            steps=len(speculation.steps), backbone_evaluations=speculation.target_evaluations,
            head_evaluations=speculation.head_evaluations, seconds=time.perf_counter() - start,
            draft_evaluations=speculation.draft_evaluations, verifications=speculation.verifications,
            tested=speculation.tested, accepted=speculation.accepted))


class ContinuousSpeculative(MaskedSpeculative):
    """As the official code: one call of the target verifies a block, token by token, and drops nothing."""

    def run(self, speculation: Speculation, callback: Callback | None) -> None:
        for turn in turns(speculation.steps, prefill=self.prefill, length=self.length):
            if turn.drafts:
                speculation.draft(turn.step)
            else:
                speculation.prefill(turn.step)
            if turn.verifies:
                speculation.verify(speculation.block())
                speculation.drafted.clear()
            if callback is not None:
                callback(Progress(step=turn.step, decoding=speculation.drafting))


class PrefixSpeculative(MaskedSpeculative):
    """As the paper: drafts are verified in order, and those after a step with a rejected token are drafted anew.

    Images are drawn one by one, since each has a place of its own in the plan. The paper's parallel target calls, one
    per prefix, run one after another here: this order is offered to compare results, not for speed.
    """

    def _drawn(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None) -> Sampled:
        parts = [super(PrefixSpeculative, self)._drawn(generator, condition.rows([row]), draws.rows([row]),
                                                       callback if row == 0 else None)
                 for row in range(condition.size)]
        counts = [vars(part.counts) for part in parts]
        total = {name: sum(count[name] for count in counts) for name in counts[0]} | {"steps": counts[0]["steps"]}
        return Sampled(tokens=torch.cat([part.tokens for part in parts]), counts=Counts(**total))

    def run(self, speculation: Speculation, callback: Callback | None) -> None:
        steps, index = speculation.steps, 0
        while index < len(steps):
            if steps[index].index <= steps[index].of * self.prefill:
                speculation.prefill(steps[index])
                index += 1
            else:
                index = self.block(speculation, index)
            if callback is not None:
                callback(Progress(step=steps[index - 1], decoding=speculation.target))

    def block(self, speculation: Speculation, index: int) -> int:
        """Draft and verify from a step on; returns the index of the first step that is not settled."""
        before = []
        for step in speculation.steps[index:index + self.length]:
            before.append(copy(speculation.drafting))  # commits replace what they change: a copy stays as it was
            speculation.draft(step)
        drafted = list(speculation.drafted)
        speculation.drafted.clear()
        for offset, step in enumerate(drafted):
            judged = speculation.verify(step)
            if not judged.accepted.all():
                speculation.drafting = before[offset]
                speculation.settle(step, judged.tokens)
                return index + offset + 1
        return index + len(drafted)
