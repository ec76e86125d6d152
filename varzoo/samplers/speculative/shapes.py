"""How a draft grows: static trees, dynamic trees, and independent sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.core.errors import unknown
from varzoo.generators.trees import Tree
from varzoo.predictions.categorical import filtered
from varzoo.samplers.speculative.models import DraftState
from varzoo.samplers.speculative.proposals import POINT, WITH, WITHOUT, Proposal


@dataclass(frozen=True, kw_only=True)
class Processing:
    """Temperature and filters, of target and draft alike; temperature 0 is greedy."""

    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        return self.options.get("temperature", 1.0) == 0

    def logits(self, logits: Tensor) -> Tensor:
        return logits if self.greedy else filtered(logits, **self.options)

    def probabilities(self, logits: Tensor) -> Tensor:
        return self.logits(logits).softmax(dim=-1)


IMPOSSIBLE = -1e4  # the logarithm of a probability of 0, finite so that sums keep their order


class Shape(ABC):
    """Base of all ways to grow.

    Attributes:
        kind: how children are chosen (see `Proposal`); in greedy decoding always "point".
        nodes, levels: most nodes of a proposal, and how deep it is.
        fed: most nodes, node 0 included, that the draft model is fed.
        children: most different children of a node.
    """

    kind: ClassVar[str]
    nodes: int
    levels: int
    fed: int
    children: int = 1

    @abstractmethod
    def grow(self, state: DraftState, pending: Tensor, first: Tensor, processing: Processing,
             draws: AnyDraws) -> Proposal:
        """Draft what may follow.

        Args:
            state: of the draft model.
            pending: `[B, w]` node 0.
            first: `[B]` index of the cell after it, by which draws are keyed.
            processing: what the draft's logits go through.
        """

    def require_vocabulary(self, size: int) -> None:
        """Raise ValueError if nodes have more children than there are ids."""
        if self.children > size:
            raise ValueError(f"{type(self).__name__} chooses {self.children} different children of a node, but there "
                             f"are only {size} ids: choose a narrower tree.")


def without_replacement(probabilities: Tensor, gumbel: Tensor, count: int) -> Tensor:
    """`count` ids `[..., count]` drawn one after the other from `[..., V]`, none twice, by the Gumbel-top-k trick."""
    return (probabilities.log() + gumbel).topk(count, dim=-1).indices


@dataclass(frozen=True, eq=False)
class StaticLevel:
    """Nodes of one depth: from which distribution of the level above, its how-manieth draw, and who is fed.

    `tree` is that of all nodes fed up to this depth.
    """

    group: Tensor
    rank: Tensor
    fed: Tensor
    tree: Tree


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """A static tree of all nodes, and each node's number among those with children, which are fed; -1 for leaves."""

    tree: Tree
    number: Tensor
    levels: tuple[StaticLevel, ...]


class StaticTree(Shape):
    """EAGLE's first kind of tree: its form is fixed, children are drawn without replacement (arXiv 2401.15077).

    Args:
        paths: of all nodes but node 0: [a, b] is the b-th drawn child of the a-th drawn child of node 0. Or a name of
            `TREES`.
    """

    kind = WITHOUT

    def __init__(self, *, paths: Sequence[Sequence[int]] | str) -> None:
        if isinstance(paths, str):
            if paths not in TREES:
                raise unknown("static tree", paths, TREES)
            paths = TREES[paths]
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if not ordered or len(ordered) != len(paths):
            raise ValueError("a static tree has at least one path, and none twice.")
        index = {(): 0} | {path: number for number, path in enumerate(ordered, start=1)}
        for path in ordered:
            if path[:-1] not in index or min(path) < 0:
                raise ValueError(f"path {list(path)} of the static tree hangs in the air: add {list(path[:-1])}.")
        self.paths = tuple(ordered)
        self.parents = [-1, *(index[path[:-1]] for path in ordered)]
        self.rank = [0, *(path[-1] for path in ordered)]
        self.depth = [0, *(len(path) for path in ordered)]
        self.inner = sorted(set(self.parents[1:]))  # nodes with children, which are those the draft model is fed
        self.nodes, self.levels, self.fed = len(ordered) + 1, len(ordered[-1]), len(self.inner)
        self.children = max(self.rank) + 1
        self._moved: dict[torch.device, StaticPlan] = {}

    def on(self, device: torch.device) -> StaticPlan:
        """The tree in tensors, made once per device."""
        if device not in self._moved:
            number = {node: place for place, node in enumerate(self.inner)}
            parents = [-1, *(number[self.parents[node]] for node in self.inner[1:])]
            inner, levels = Tree(torch.tensor(parents, device=device)[None], self.levels - 1), []
            for level in range(self.levels):
                groups = [node for node in self.inner if self.depth[node] == level]
                here = [node for node in range(self.nodes) if self.depth[node] == level + 1]
                known = sum(self.depth[node] <= level + 1 for node in self.inner)
                levels.append(StaticLevel(
                    tree=inner.first(known),
                    group=torch.tensor([groups.index(self.parents[node]) for node in here], device=device),
                    rank=torch.tensor([self.rank[node] for node in here], device=device),
                    fed=torch.tensor([place for place, node in enumerate(here) if node in number], dtype=torch.long,
                                     device=device)))
            own = [number.get(node, -1) for node in range(self.nodes)]
            self._moved[device] = StaticPlan(
                tree=Tree(torch.tensor(self.parents, device=device)[None], self.levels),
                number=torch.tensor(own, device=device)[None], levels=tuple(levels))
        return self._moved[device]

    def grow(self, state: DraftState, pending: Tensor, first: Tensor, processing: Processing,
             draws: AnyDraws) -> Proposal:
        plan = self.on(pending.device)
        logits, tokens, drafts = state.root(), [pending[:, None]], []
        for number, level in enumerate(plan.levels):
            if processing.greedy:
                chosen = logits[:, :, 0].topk(self.children, dim=-1).indices
            else:
                drafts.append(processing.probabilities(logits))
                size = tuple(drafts[-1].shape[1::2])
                gumbel = draws.gumbel("draft", size, at=first[:, None] + number)[:, 0]
                chosen = without_replacement(drafts[-1][:, :, 0], gumbel, self.children)
            tokens.append(chosen[:, level.group, level.rank][..., None])
            if len(level.fed):
                logits = state.grow(tokens[-1][:, level.fed], level.tree)
        return Proposal(tokens=torch.cat(tokens, dim=1), kind=POINT if processing.greedy else WITHOUT, tree=plan.tree,
                        q=torch.cat(drafts, dim=1) if drafts else None, group=plan.number.clamp(min=0),
                        fed=plan.number)


@dataclass(frozen=True, eq=False)
class Children:
    """Scored children `[B, parents, k]` of the nodes of a level, each node's in the order in which they are tested.

    Logarithms: `place` says how much a child deserves to be verified, `follow` how much to have children itself. No
    child has a better `place` than its parent or than a child of the same node before it: what is chosen is a tree.
    """

    ids: Tensor
    place: Tensor
    follow: Tensor


class DynamicTree(Shape):
    """EAGLE-2's tree: the likeliest paths by the draft's own probabilities (arXiv 2406.16858).

    Args:
        top_k: children that are scored of each node, and nodes of a level that are followed.
        depth: levels after the first.
        total: nodes that are verified, node 0 included.
    """

    kind = POINT

    def __init__(self, *, top_k: int, depth: int, total: int) -> None:
        pool = top_k + depth * top_k**2
        if top_k < 1 or depth < 0 or not 2 <= total <= pool + 1:
            raise ValueError(f"a dynamic tree needs top_k >= 1, depth >= 0 and 2 <= total <= {pool + 1} (of {top_k} + "
                             f"{depth} x {top_k}^2 scored nodes), got total={total}.")
        self.top_k, self.depth, self.total, self.children = top_k, depth, total, top_k
        self.nodes, self.levels, self.fed = total, depth + 1, 1 + depth * top_k

    def propose(self, scores: Tensor, logits: Tensor, gumbel: Tensor | None) -> Children:
        """Children of nodes `[B, m]` of given `follow` scores, by logits `[B, m, V]`."""
        likely, ids = _likeliest(logits.log_softmax(dim=-1), self.top_k)
        likely = scores[..., None] + likely.clamp(min=IMPOSSIBLE)
        return Children(ids=ids, place=likely, follow=likely)

    def grow(self, state: DraftState, pending: Tensor, first: Tensor, processing: Processing,
             draws: AnyDraws) -> Proposal:
        batch, k, device = len(pending), self.top_k, pending.device
        drawn = self.kind != POINT and not processing.greedy
        root = torch.zeros(batch, 1, dtype=torch.long, device=device)
        scores, logits = root.float(), processing.logits(state.root())[:, :, 0]
        # Numbers of nodes in the pool of all that is scored (-1: node 0), and of the parents in what is fed.
        numbers, fed, drafts = root - 1, [(root - 1, root - 1)], []
        pool: list[tuple[Tensor, Tensor, Tensor]] = []
        for level in range(self.depth + 1):
            gumbel = draws.gumbel("draft", tuple(logits.shape[1:]), at=first[:, None] + level)[:, 0] if drawn else None
            if drawn:
                drafts.append(logits)
            children = self.propose(scores, logits, gumbel)
            ids, size = children.ids.flatten(1), sum(part.shape[1] for part, _, _ in pool)
            pool.append((children.place.flatten(1), ids, numbers.repeat_interleave(k, dim=1)))
            if level < self.depth:
                scores, best = _likeliest(children.follow.flatten(1), k)
                before = sum(part.shape[1] for part, _ in fed[:-1])
                hung = before + best // k
                numbers = size + best
                fed.append((numbers, hung))
                tree = Tree(torch.cat([parents for _, parents in fed], dim=1), level + 1)
                logits = processing.logits(state.grow(ids.gather(1, best)[..., None], tree))[:, :, 0]
        places, tokens, parents = (torch.cat(parts, dim=1) for parts in zip(*pool))
        chosen = places.sort(dim=1, descending=True, stable=True).indices[:, :self.total - 1].sort(dim=1).values
        node = torch.full_like(tokens, -1).scatter(1, chosen, torch.arange(1, self.total, device=device)
                                                   .expand(batch, -1))
        above = parents.gather(1, chosen)
        above = torch.where(above >= 0, node.gather(1, above.clamp(min=0)), 0)
        order = torch.cat([numbers for numbers, _ in fed], dim=1)[:, 1:]
        number = torch.full_like(tokens, -1).scatter(1, order, torch.arange(1, order.shape[1] + 1, device=device)
                                                     .expand(batch, -1))
        number = torch.cat([root, number.gather(1, chosen)], dim=1)
        tree = Tree(torch.cat([root - 1, above], dim=1), self.levels)
        return Proposal(tokens=torch.cat([pending[:, None], tokens.gather(1, chosen)[..., None]], dim=1), tree=tree,
                        kind=self.kind if drawn else POINT, preference=_first_leaf(tree), group=number.clamp(min=0),
                        q=torch.cat(drafts, dim=1).softmax(dim=-1)[:, :, None] if drawn else None, fed=number)


class DySpecTree(DynamicTree):
    """DySpec's tree: EAGLE-2's, with children drawn without replacement (arXiv 2410.11744).

    A place in the tree is worth the probability that verification gets there, taking the draft's for the target's:
    v (1 - the draft's probability of the siblings before) in a node of value v. That is known before its token is
    drawn, so choosing places does not choose tokens, and exact policies stay exact.

    Args are those of `DynamicTree`. The paper's heap draws from one node at a time, without `top_k`; here a level is
    drawn by one call of the draft model.
    """

    kind = WITHOUT

    def propose(self, scores: Tensor, logits: Tensor, gumbel: Tensor | None) -> Children:
        probabilities = logits.softmax(dim=-1)
        ids = (probabilities.topk(self.top_k, dim=-1).indices if gumbel is None
               else without_replacement(probabilities, gumbel, self.top_k))
        drawn = probabilities.gather(-1, ids)
        left = 1 - (drawn.cumsum(dim=-1) - drawn)
        place, follow = (scores[..., None] + part.clamp(min=1e-30).log().clamp(min=IMPOSSIBLE)
                         for part in (left, drawn))
        return Children(ids=ids, place=place.cummin(dim=-1).values, follow=follow)


class Sequences(Shape):
    """Independent sequences, drawn with replacement: one is plain speculative sampling, several are SpecTr's drafts.

    Args:
        count: how many.
        length: cells of each.
    """

    kind = WITH

    def __init__(self, *, length: int, count: int = 1) -> None:
        if length < 1 or count < 1:
            raise ValueError(f"drafts are at least 1 sequence of at least 1 cell, got {count} of {length}.")
        self.count, self.length = count, length
        self.nodes, self.levels, self.fed = 1 + count * length, length, 1 + count * (length - 1)
        self._moved: dict[torch.device, tuple[Tree, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tree, ...]:
        """The trees of the first 1, 2, ... levels, made once per device."""
        if device not in self._moved:
            node = torch.arange(self.nodes, device=device)
            parents = torch.where(node <= self.count, (node > 0).long() - 1, node - self.count)
            whole = Tree(parents[None], self.levels)
            self._moved[device] = tuple(whole.first(1 + level * self.count) for level in range(1, self.length + 1))
        return self._moved[device]

    def grow(self, state: DraftState, pending: Tensor, first: Tensor, processing: Processing,
             draws: AnyDraws) -> Proposal:
        device, width = pending.device, pending.shape[1]
        logits, tokens, drafts = state.root(), [pending[:, None]], []
        node, trees = torch.arange(self.nodes, device=device), self.on(device)
        for level in range(self.length):
            if processing.greedy:
                chosen = logits.argmax(dim=-1).expand(-1, self.count, -1)
            else:
                drafts.append(processing.probabilities(logits))
                uniforms = draws.uniform("draft", (self.count, width), at=first[:, None] + level)[:, 0]
                chosen = inverse_cdf(drafts[-1].expand(-1, self.count, -1, -1), uniforms)
            tokens.append(chosen)
            if level + 1 < self.length:
                logits = state.grow(chosen, trees[level])
        group = torch.where(node == 0, 0, node).clamp(max=self.fed - 1)[None]
        fed = torch.where(node < self.fed, node, -1)[None]
        return Proposal(tokens=torch.cat(tokens, dim=1), tree=trees[-1], kind=POINT if processing.greedy else WITH,
                        q=torch.cat(drafts, dim=1) if drafts else None, group=group, fed=fed)


def _likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = values.topk(count, dim=-1)
    return best.values, best.indices


def _first_leaf(tree: Tree) -> Tensor:
    """`[B, n]` the lowest leaf under each node: the official order of paths, where greedy decoding takes the first."""
    node = torch.arange(tree.nodes, device=tree.parents.device)
    inner = torch.zeros_like(tree.parents, dtype=torch.bool).scatter(1, tree.parents.clamp(min=0)[:, 1:], True)
    leaves = torch.where(inner, tree.nodes, node)
    return torch.where(tree.lineage.mT, leaves[:, None], tree.nodes).amin(dim=2)


def _paths(text: str) -> list[list[int]]:
    return [[int(rank) for rank in path] for path in text.split()]


TREES = {  # published with LANTERN's code (jadohu/LANTERN)
    "mc_sim_7b_63": _paths(
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"),
    "naive_extend_57": _paths(
        "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 "
        "000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200 "
        "0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 "
        "00000 00001 00002 00010 00011 00100 00101 00110 00200"),
    "chain": _paths("0 00 000 0000 00000"),
}
