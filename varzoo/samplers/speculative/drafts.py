"""Where proposals come from: a draft model that grows a shape, or the target's own last iterate (Jacobi)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.core.errors import unknown
from varzoo.generators.base import Condition, Generator
from varzoo.generators.causal import CausalGenerator
from varzoo.generators.ragged import Outlook, RaggedDecoding
from varzoo.generators.trees import Tree
from varzoo.samplers.base import GuidanceSetting
from varzoo.samplers.speculative.models import DraftModel, DraftState
from varzoo.samplers.speculative.proposals import POINT, WITH, Proposal, Verdict
from varzoo.samplers.speculative.shapes import Processing, Sequences, Shape


class Drafting(ABC):
    """The state of one batch: proposes, and learns what became of it."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Runs of the draft's network so far."""

    @abstractmethod
    def propose(self) -> Proposal:
        """What may follow the pending cell."""

    @abstractmethod
    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook, p: Tensor) -> None:
        """Take what the decoding has just kept; p `[B, n, w, V]` is the target's distribution after each node."""


class Draft(ABC):
    """Base of all sources of proposals.

    Attributes:
        kind: how children are chosen (see `Proposal`).
        nodes, levels: most nodes of a proposal, and how deep it is.
        networks: weights that belong to it.
    """

    kind: str
    nodes: int
    levels: int
    networks: tuple[nn.Module, ...] = ()

    @abstractmethod
    def check(self, target: Generator) -> None:
        """Raise ValueError if it cannot draft for a target."""

    @abstractmethod
    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, processing: Processing) -> Drafting:
        """Open the state for a decoding that knows its first cell; arguments as of `DraftModel.begin`."""


class ModelDraft(Draft):
    """A model that grows a shape.

    Args:
        model: what scores nodes: `Eagle` or `Smaller`.
        shape: what grows: `StaticTree`, `DynamicTree`, `DySpecTree` or `Sequences`.
    """

    def __init__(self, *, model: DraftModel, shape: Shape) -> None:
        self.model, self.shape, self.kind = model, shape, shape.kind
        self.nodes, self.levels, self.networks = shape.nodes, shape.levels, (model.network,)

    def check(self, target: Generator) -> None:
        self.model.check(target)
        self.shape.require_vocabulary(target.spec.size)
        assert isinstance(target, CausalGenerator)  # as the model saw
        ids = target.order.positions.shape[1] * target.spec.depth
        if ids > 1 and not (isinstance(self.shape, Sequences) and self.shape.count == 1):
            raise ValueError(f"a step of {type(target).__name__} draws {ids} ids at once, and siblings would have to "
                             "agree in all of them: draft one sequence (Sequences(length=...)), or none (sampler=sjd).")

    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, processing: Processing) -> ModelDrafting:
        state = self.model.begin(decoding, prefill, condition=condition, draws=draws, guidance=guidance,
                                 nodes=self.shape.fed, levels=self.shape.levels)
        return ModelDrafting(self.shape, state, decoding, draws, processing)


class ModelDrafting(Drafting):
    def __init__(self, shape: Shape, state: DraftState, decoding: RaggedDecoding, draws: AnyDraws,
                 processing: Processing) -> None:
        self.shape, self.state, self.decoding, self.draws, self.processing = shape, state, decoding, draws, processing

    @property
    def evaluations(self) -> int:
        return self.state.evaluations

    def propose(self) -> Proposal:
        return self.shape.grow(self.state, self.decoding.pending, self.decoding.known, self.processing, self.draws)

    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook, p: Tensor) -> None:
        self.state.follow(proposal, verdict, outlook)


FILLS = ("random", "repeat")


class Jacobi(Draft):
    """No draft model: what the target drew at later cells, given drafts before them, is the next draft.

    Speculative Jacobi decoding (SJD, arXiv 2410.01699; official code: tyshiwo1/Accelerating-T2I-AR-with-SJD).

    Args:
        window: cells of an iteration, the pending one included (official: 16).
        fill: what stands at cells that no iteration has drawn yet: "random" ids (official for Lumina-mGPT), or
            "repeat" of the cell before (official for LlamaGen). Either counts as drawn from a point mass.

    The official code decodes the last W + 2 tokens one by one; here the window goes on past the end, and what it finds
    there is dropped.
    """

    kind = WITH

    def __init__(self, *, window: int, fill: str) -> None:
        if window < 2:
            raise ValueError(f"a Jacobi window has at least 2 cells, got {window}.")
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        self.window, self.fill = window, fill
        self.nodes, self.levels = window, window - 1

    def check(self, target: Generator) -> None:
        pass  # the target is its own draft

    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, processing: Processing) -> JacobiDrafting:
        return JacobiDrafting(self, decoding, draws, processing)


class JacobiDrafting(Drafting):
    evaluations = 0

    def __init__(self, draft: Jacobi, decoding: RaggedDecoding, draws: AnyDraws, processing: Processing) -> None:
        self.draft, self.decoding, self.draws, self.processing = draft, decoding, draws, processing
        self._round = 0
        nothing = decoding.pending[:, None][:, :0]
        self._tokens, self._q = self._filled(nothing, None, torch.zeros_like(decoding.known))

    def propose(self) -> Proposal:
        ahead = torch.arange(self.draft.window, device=self._tokens.device)[None]
        tokens = torch.cat([self.decoding.pending[:, None], self._tokens], dim=1)
        kind, q = (POINT, None) if self.processing.greedy else (WITH, self._q)
        return Proposal(tokens=tokens, tree=Tree.chain(self.draft.window, tokens.device), kind=kind, q=q, group=ahead)

    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook, p: Tensor) -> None:
        cells = (self.decoding.known - (verdict.path >= 0).sum(dim=1))[:, None]  # that node 0 predicts
        cells = cells + torch.arange(self.draft.window, device=cells.device)
        if self.processing.greedy:
            fresh = outlook.logits.argmax(dim=-1)
        else:
            uniforms = self.draws.uniform("fresh", (p.shape[2],), at=cells, round=self._round)
            fresh = inverse_cdf(p, uniforms)
        self._round += 1
        accepted = verdict.accepted
        index = accepted[:, None] + torch.arange(1, self.draft.window, device=cells.device)  # of what stays a draft
        index = index.clamp(max=self.draft.window - 1)
        samples = torch.arange(len(index), device=index.device)[:, None]
        self._tokens, self._q = self._filled(fresh[samples, index], p[samples, index],
                                             self.draft.window - 1 - accepted)

    def _filled(self, tokens: Tensor, q: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor | None]:
        """The window's drafts: the first `count` `[B]` of those given, then what fills it."""
        device, size = self.decoding.known.device, self.decoding.generator.spec.size
        place = torch.arange(self.draft.window - 1, device=device)
        new = place >= count[:, None]
        if self.draft.fill == "random":
            first = self.decoding.known[:, None]
            fill = self.draws.integers("fill", size, (self.decoding.width,), at=first + place, round=self._round)
        else:
            known = torch.cat([self.decoding.pending[:, None], tokens], dim=1)
            fill = known[torch.arange(len(known), device=device), count][:, None].expand(-1, len(place), -1)
        if q is None:
            tokens, new = fill, torch.ones_like(new)
        tokens = torch.where(new[..., None], fill, tokens)
        if self.processing.greedy:
            return tokens, None
        sure = F.one_hot(tokens, size).float()
        return tokens, sure if q is None else torch.where(new[..., None, None], sure, q)
