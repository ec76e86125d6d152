"""What drafts are made by: an EAGLE drafter, or a smaller generator of the same tokens.

Both score a tree level by level: `root` gives the logits of what may follow the pending cell, `grow` feeds further
nodes and gives theirs, and `follow` takes what the target has kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.generators.base import Condition, Generator
from varzoo.generators.causal import CausalGenerator
from varzoo.generators.drafter import Drafter
from varzoo.generators.llama import LlamaGenerator
from varzoo.generators.ragged import Outlook, Ragged, RaggedDecoding
from varzoo.generators.trees import Tree
from varzoo.nn.llama import Sight
from varzoo.samplers.base import GuidanceSetting
from varzoo.samplers.speculative.proposals import Proposal, Verdict


class DraftState(ABC):
    """The state of one batch of drafts. `evaluations` counts runs of its network."""

    evaluations: int = 0

    @abstractmethod
    def root(self) -> Tensor:
        """Logits `[B, 1, w, V]` of the cell after the pending one; drafting begins anew."""

    @abstractmethod
    def grow(self, tokens: Tensor, tree: Tree) -> Tensor:
        """Feed nodes `[B, m, w]`, the last m of a tree whose earlier nodes were fed; their logits `[B, m, w, V]`."""

    @abstractmethod
    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook) -> None:
        """Take what the target's decoding has just kept."""


class DraftModel(ABC):
    """Base of what drafts are made by; `network` is its weights."""

    network: Generator

    @abstractmethod
    def check(self, target: Generator) -> None:
        """Raise ValueError if it cannot draft for a target."""

    @abstractmethod
    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, nodes: int, levels: int) -> DraftState:
        """Open the state for a decoding that knows its first cell.

        Args:
            prefill: what the target said of its prefix.
            condition, draws, guidance: as given to the target.
            nodes, levels: most nodes that are fed between two verifications, and how deep they may be.
        """


class Eagle(DraftModel):
    """A drafter that predicts the target's hidden states (`varzoo.generators.drafter`)."""

    network: Drafter

    def __init__(self, *, drafter: Drafter) -> None:
        if not isinstance(drafter, Drafter):
            raise ValueError(f"Eagle drafts with a Drafter, got {type(drafter).__name__}: use Smaller(generator=...).")
        self.network = drafter.eval()

    def check(self, target: Generator) -> None:
        self.network.require_fit(target)

    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, nodes: int, levels: int) -> EagleState:
        return EagleState(self.network, decoding, prefill, nodes, levels)


class EagleState(DraftState):
    """Keys and values of verified tokens, and behind them, for one drafting, of nodes.

    Slot s holds the feature of the target's slot s and the token after it, whose rotary row is that of place s + 1.
    """

    def __init__(self, drafter: Drafter, decoding: RaggedDecoding, prefill: Outlook, nodes: int, levels: int) -> None:
        assert isinstance(decoding.generator, LlamaGenerator)  # as `Drafter.require_fit` saw
        self.drafter, self.decoding, self._rows = drafter, decoding, decoding.generator.rows
        branches, batch, prefix = prefill.features.shape[:3]
        self._cache = drafter.new_cache(branches * batch, prefix + decoding.cells + levels + nodes + 2)
        self._length = torch.zeros_like(decoding.known)
        ids = torch.cat([torch.zeros(batch, prefix - 1, dtype=torch.long, device=decoding.known.device),
                         decoding.pending], dim=1)
        self._absorb(prefill.features, ids, torch.full_like(decoding.known, prefix))

    def root(self) -> Tensor:
        self._outputs = self._last
        return self.decoding.score(self._outputs, self.decoding.known[:, None])

    def grow(self, tokens: Tensor, tree: Tree) -> Tensor:
        batch, count = tokens.shape[:2]
        parents = tree.parents.expand(batch, -1)[:, -count:]
        depth = tree.depth.expand(batch, -1)[:, -count:]
        features = self._outputs.gather(2, parents[None, :, :, None].expand(len(self._outputs), -1, -1,
                                                                            self._outputs.shape[3]))
        slots = self._length[:, None] - 1 + torch.arange(tree.nodes - count, tree.nodes, device=tokens.device)
        lineage = tree.lineage.expand(batch, -1, -1)[:, -count:]
        self._cache.reach = int(self._length.max()) + tree.nodes - 1
        node = torch.arange(self._cache.reach, device=tokens.device) - self._length[:, None] + 1
        line = lineage.gather(2, node.clamp(0, tree.nodes - 1)[:, None].expand(-1, count, -1))
        mask = (line & (node < tree.nodes)[:, None]) | (node < 1)[:, None]
        outputs = self._run(features, tokens[..., 0], self._length[:, None] + depth - 1, slots, mask)
        self._outputs = torch.cat([self._outputs, outputs], dim=2)
        return self.decoding.score(outputs, self.decoding.known[:, None] + depth)

    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook) -> None:
        path, features = verdict.path, outlook.features
        count = (path >= 0).sum(dim=1)
        kept = features.gather(2, path.clamp(min=0)[None, :, :, None].expand(len(features), -1, -1, features.shape[3]))
        place = torch.arange(path.shape[1], device=path.device)
        after = (self.decoding.known - count)[:, None] + place  # the cell after each kept node
        last = (self.decoding.known - 1)[:, None]
        self._absorb(kept, self.decoding.cell(after.minimum(last))[..., 0], count)

    def _absorb(self, features: Tensor, ids: Tensor, count: Tensor) -> None:
        """Feed the first `count` `[B]` of features `[branches, B, m, width]` and the tokens `[B, m]` after them."""
        slots = self._length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self._cache.reach = int(slots.max()) + 1
        mask = torch.arange(self._cache.reach, device=ids.device) <= slots[..., None]
        outputs = self._run(features, ids, slots, slots, mask)
        last = (count - 1).clamp(min=0)[None, :, None, None].expand(len(outputs), -1, 1, outputs.shape[3])
        self._last = outputs.gather(2, last)
        self._length = self._length + count

    def _run(self, features: Tensor, ids: Tensor, places: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        branches = len(features)
        each = lambda tensor: tensor.repeat(branches, *(1,) * (tensor.ndim - 1))  # noqa: E731
        self.evaluations += 1
        return self.drafter(features.flatten(0, 1), each(ids), self._rows(each(places) + 1),
                            sight=Sight(mask=each(mask[:, None])), cache=self._cache,
                            slots=each(slots)).unflatten(0, (branches, -1))


class Smaller(DraftModel):
    """Any causal generator of the same tokens."""

    def __init__(self, *, generator: Generator) -> None:
        self.network = generator.eval()

    def check(self, target: Generator) -> None:
        if "verify" not in self.network.offers:
            raise ValueError(f"{type(self.network).__name__} cannot draft, since {self.network.lacks('verify')}. Draft "
                             "by a causal generator, or by none (sampler=sjd).")
        if self.network.spec != target.spec:
            raise ValueError(f"the draft generator models {self.network.spec}, the target {target.spec}: both must "
                             "have the same tokenizer.")
        assert isinstance(self.network, CausalGenerator) and isinstance(target, CausalGenerator)  # who else verifies?
        if not torch.equal(self.network.order.positions, target.order.positions):
            raise ValueError(f"{type(self.network).__name__} draws tokens in another order than "
                             f"{type(target).__name__}: choose a draft with the target's order.")

    def begin(self, decoding: RaggedDecoding, prefill: Outlook, *, condition: Condition, draws: AnyDraws,
              guidance: GuidanceSetting, nodes: int, levels: int) -> SmallerState:
        plan = Ragged(nodes=nodes + 1, levels=levels + 1, prefix=decoding.plan.prefix)
        own = self.network.begin(condition, draws=draws, guidance=guidance, plan=plan)
        assert isinstance(own, RaggedDecoding)  # as planned
        own.prefill()
        own.admit(decoding.pending)
        return SmallerState(own, decoding)


class SmallerState(DraftState):
    """A decoding of its own that stays one cell behind the target's.

    The last node that is kept may not have been fed here, so it is not kept here but fed again, before the pending one.
    """

    def __init__(self, own: RaggedDecoding, decoding: RaggedDecoding) -> None:
        self.own, self.decoding = own, decoding
        self.evaluations = 1
        self._behind = 0  # cells that are fed before the pending one

    def root(self) -> Tensor:
        pending = self.decoding.pending[:, None]
        self._ids = torch.cat([self.own.pending[:, None], pending], dim=1) if self._behind else pending
        return self._feed(Tree.chain(1, pending.device), start=0)[:, -1:]

    def grow(self, tokens: Tensor, tree: Tree) -> Tensor:
        self._ids = torch.cat([self._ids, tokens], dim=1)
        return self._feed(tree, start=self._ids.shape[1] - tokens.shape[1])

    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook) -> None:
        path = verdict.path
        assert proposal.fed is not None, "what a model has grown, it was fed"
        fed = proposal.fed.expand(len(path), -1).gather(1, path.clamp(min=0)) + self._behind
        last = torch.arange(path.shape[1], device=path.device) >= verdict.accepted[:, None]
        kept = torch.where(last, -1, fed)
        active = path[:, :1] >= 0
        if self._behind:
            kept = torch.cat([torch.where(active, 0, -1), kept], dim=1)
        self.own.keep(torch.where(active, kept, -1), self.decoding.cell((self.decoding.known - 2).clamp(min=0)))
        self._behind = 1

    def _feed(self, tree: Tree, start: int) -> Tensor:
        self.evaluations += 1
        whole = tree.below(1) if self._behind else tree
        return self.own.verify(self._ids, whole, start).logits
