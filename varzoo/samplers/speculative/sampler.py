"""The loop: propose, verify, keep, draw what follows; every sample at its own pace."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.core.steps import Schedule, Step, of_phase
from varzoo.generators.base import Condition, Generator
from varzoo.generators.causal import Prefix
from varzoo.generators.llama import LlamaGenerator
from varzoo.generators.ragged import Ragged, RaggedDecoding
from varzoo.samplers.base import Callback, Counts, GuidanceSetting, Progress, Sampled, Sampler, check_options
from varzoo.samplers.speculative.drafts import Draft
from varzoo.samplers.speculative.neighbours import cached_table
from varzoo.samplers.speculative.policies import Grouped, Lantern, Policy
from varzoo.samplers.speculative.proposals import KINDS, Proposal, Verdict
from varzoo.samplers.speculative.shapes import Processing
from varzoo.samplers.speculative.verify import verify, verify_greedy


class Speculative(Sampler):
    """Draft several tokens, verify them in one call of the target, keep some.

    Args:
        draft: where proposals come from.
        policy: when a draft is kept. At temperature 0 exact policies are plain greedy decoding.
        guidance: scale of classifier-free guidance per step, for the target and the draft alike.
        plan: a `Prefix`, where any prefix of the tokens decodes.
        draw: temperature, top_k, top_p and filters, of target and draft alike; numbers, since a step's are not known
            before it is drafted.
        neighbours: folder where tables of nearest codes are kept; by default in the user's cache.
    """

    needs = frozenset({"verify"})

    def __init__(self, *, draft: Draft, policy: Policy, guidance: GuidanceSetting = None, plan: Prefix | None = None,
                 draw: Mapping[str, Any] | None = None, neighbours: str | Path | None = None) -> None:
        self.draft, self.policy, self.guidance, self.plan = draft, policy, guidance, plan
        self.processing, self.neighbours = Processing(options=dict(draw or {})), neighbours
        for name, value in self.processing.options.items():
            if isinstance(value, Schedule):
                raise ValueError(f"speculative sampling takes a number for {name}, no schedule: drafts are drawn "
                                 "before it is known at which step.")
        if plan is not None and not isinstance(plan, Prefix):
            raise ValueError(f"speculative samplers draw all tokens, or a Prefix of them; they take no {plan}. Choose "
                             "Autoregressive (sampler=categorical).")
        if draft.kind not in policy.kinds:
            fitting = ", ".join(sorted(KINDS[kind] for kind in policy.kinds))
            raise ValueError(f"{type(policy).__name__} verifies drafts that are {fitting}; those of this draft are "
                             f"{KINDS[draft.kind]}. Choose another shape (Sequences, StaticTree, DynamicTree, "
                             "DySpecTree) or policy (Exact takes all).")

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return self.draft.networks

    @property
    def needs_codebook(self) -> bool:
        return self.policy.needs_codebook

    def use_codebook(self, codebook: Tensor) -> None:
        """Take the tokenizer's codes, for policies that compare them; the table is computed once and kept on disk."""
        if isinstance(self.policy, Lantern):
            if codebook.ndim != 2:
                raise ValueError(f"LANTERN compares codes of one codebook, this tokenizer has {len(codebook)} of them: "
                                 "choose an exact policy (sampler=speculative or sjd).")
            self.policy.use_table(cached_table(codebook, self.policy.columns(len(codebook)), self.neighbours))

    def check(self, generator: Generator) -> None:
        super().check(generator)
        of_phase(self.guidance)
        generator.check_plan(self.plan)
        check_options(self.processing.options, generator)
        self.draft.check(generator)
        if self.policy.needs_codebook and generator.spec.depth > 1:
            raise ValueError(f"{type(self.policy).__name__} compares codes, and a position of {generator.spec} has "
                             "several ids: choose an exact policy (sampler=speculative or sjd).")
        if self.policy.needs_embeddings and "features" not in generator.offers:
            raise ValueError(f"{type(self.policy).__name__} compares input embeddings of ids, which "
                             f"{type(generator).__name__} does not have one by one: choose an exact policy "
                             "(sampler=sjd).")

    @torch.no_grad()
    def sample(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None = None) -> Sampled:
        self.check(generator)
        start = time.perf_counter()
        batch = self.open(generator, condition, draws)
        drawn = 0
        while not batch.done:
            batch.advance(batch.decoding.known < batch.decoding.cells)
            known = min(int(batch.decoding.known.min()), batch.decoding.cells)
            if callback is not None and known > drawn:
                callback(Progress(step=batch.covering(drawn, known), decoding=batch.decoding))
            drawn = known
        return Sampled(tokens=batch.decoding.tokens, counts=replace(
            batch.counts(), seconds=time.perf_counter() - start))

    def open(self, generator: Generator, condition: Condition, draws: AnyDraws) -> Speculation:
        """The state of one batch, its first cell drawn."""
        return Speculation(self, generator, condition, draws)


class Speculation:
    """One batch being drawn.

    Attributes:
        decoding: the target's.
        drafting: the draft's state.
        rounds: rounds so far; `tested`, `accepted` and `sample_rounds` sum over samples.
    """

    def __init__(self, sampler: Speculative, generator: Generator, condition: Condition, draws: AnyDraws) -> None:
        self.sampler, self.draws, self.processing = sampler, draws, sampler.processing
        plan = Ragged(nodes=sampler.draft.nodes, levels=sampler.draft.levels, prefix=sampler.plan)
        decoding = generator.begin(condition, draws=draws, guidance=sampler.guidance, plan=plan)
        assert isinstance(decoding, RaggedDecoding)  # as planned
        self.decoding, self.policy = decoding, sampler.policy
        if isinstance(self.policy, Grouped):
            assert isinstance(generator, LlamaGenerator)  # it offers features, as `check` saw
            self.policy = self.policy.comparing(generator.embedding.weight)
        self.rounds = 0
        self.sample_rounds, self.tested, self.accepted = 0, 0, 0
        prefill = self.decoding.prefill()
        following = self._distribution(prefill.logits)[:, -1]
        self.decoding.admit(self.draw(following, torch.zeros_like(self.decoding.known)))
        self.drafting = sampler.draft.begin(self.decoding, prefill, condition=condition.to(self.decoding.device),
                                            draws=draws, guidance=sampler.guidance, processing=self.processing)

    @property
    def done(self) -> bool:
        return bool((self.decoding.known >= self.decoding.cells).all())

    def advance(self, active: Tensor) -> tuple[Proposal, Verdict]:
        """One round; samples that are not `active` `[B]` stay as they are."""
        decoding, known = self.decoding, self.decoding.known
        proposal = self.drafting.propose()
        outlook = decoding.verify(proposal.tokens, proposal.tree)
        p = self._distribution(outlook.logits)
        verdict = self.judge(proposal, outlook.logits, p)
        verdict = replace(verdict, path=torch.where(active[:, None], verdict.path, -1))
        cells = known + verdict.accepted
        decoding.keep(verdict.path, self.draw(verdict.following, cells))
        self.drafting.follow(proposal, verdict, outlook, p)
        self.rounds += 1
        self.sample_rounds += int(active.sum())
        self.accepted += int(verdict.accepted.sum())
        self.tested += int((~verdict.odds.isnan() & active[:, None]).sum())
        return proposal, verdict

    def judge(self, proposal: Proposal, logits: Tensor, p: Tensor) -> Verdict:
        """What of a proposal is kept."""
        if self.processing.greedy:
            return verify_greedy(logits, proposal, self.policy if isinstance(self.policy, Lantern) else None)
        uniforms = self.draws.uniform("accept", tuple(proposal.tokens.shape[1:]), at=self.decoding.known[:, None])
        return verify(p, proposal, uniforms[:, 0], self.policy)

    def draw(self, following: Tensor, cells: Tensor) -> Tensor:
        """Ids `[B, w]` of cells `[B]` from distributions `[B, w, V]`, by the plain sampler's uniforms."""
        depth = self.decoding.generator.spec.depth
        size = () if depth == 1 else (depth,)
        uniforms = self.draws.uniform("token", size, at=self.decoding.positions_of(cells))
        return inverse_cdf(following, uniforms.reshape(following.shape[:2]))

    def counts(self) -> Counts:
        return Counts(steps=self.rounds + 1, backbone_evaluations=self.rounds + 1, head_evaluations=0, seconds=0.0,
                      draft_evaluations=self.drafting.evaluations, verifications=self.sample_rounds,
                      tested=self.tested, accepted=self.accepted)

    def covering(self, drawn: int, known: int) -> Step:
        """A step that stands for all cells from `drawn` on that every sample now knows."""
        first = self.decoding.planned[drawn]
        positions = self.decoding.positions[drawn:known].flatten().sort().values
        ids = self.decoding.positions.shape[1]
        return replace(first, positions=positions.expand(len(first.positions), -1), drawn=drawn * ids,
                       left=first.total - known * ids)

    def _distribution(self, logits: Tensor) -> Tensor:
        """Processed probabilities `[B, n, w, V]`; at temperature 0 all on the likeliest."""
        if self.processing.greedy:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
        return self.processing.probabilities(logits)
