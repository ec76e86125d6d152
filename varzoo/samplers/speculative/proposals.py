"""What a draft proposes, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varzoo.generators.trees import Tree

POINT, WITHOUT, WITH = "point", "without", "with"  # how the children of a node were chosen
KINDS = {POINT: "chosen, not drawn", WITHOUT: "drawn without replacement", WITH: "drawn independently"}


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Tokens that may come next, as a batch of trees.

    Args:
        tokens: `[B, n, w]` ids; a node is a cell of the generator's order, with w ids. Node 0 is known.
        tree: who follows whom.
        kind: how the children of a node were chosen: "point" (a deterministic choice, such as the likeliest), or drawn
            from `q`, "without" or "with" replacement.
        q: `[B, g, w, V]` the distributions that children were drawn from; None for "point".
        group: `[1 or B, n]` which of them the children of each node are from; anything for nodes without children.
        preference: `[1 or B, n]` of equally deep nodes, greedy verification prefers the one of the lowest value.
        fed: `[1 or B, n]` the number that each node has in the draft model's own order, -1 for those it was not fed.
    """

    tokens: Tensor
    tree: Tree
    kind: str
    q: Tensor | None = None
    group: Tensor | None = None
    preference: Tensor | None = None
    fed: Tensor | None = None

    def draft_of(self, nodes: Tensor) -> Tensor | None:
        """The distributions `[B, m, w, V]` that the children of nodes `[B, m]` were drawn from."""
        if self.q is None:
            return None
        assert self.group is not None, "q is of no use without the groups"
        group = self.group.expand(len(nodes), -1).gather(1, nodes)
        return self.q[torch.arange(len(nodes), device=nodes.device)[:, None], group]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification found.

    Args:
        path: `[B, levels + 1]` the nodes that are kept, node 0 first, -1 after the last.
        following: `[B, w, V]` the distribution of what comes after them, ids of it that are settled included.
        odds: `[B, n]` the acceptance probability (it may exceed 1) with which each node was tested, nan where it was
            not; of nodes with several ids the least.
        skipped: `[B, n]` nodes that took a uniform but could not be tested, since the draft gives them no probability.
    """

    path: Tensor
    following: Tensor
    odds: Tensor
    skipped: Tensor

    @property
    def accepted(self) -> Tensor:
        """`[B]` number of drafted nodes that are kept."""
        return (self.path > 0).sum(dim=1)

    @property
    def last(self) -> Tensor:
        """`[B]` the last node that is kept."""
        return self.path.gather(1, self.accepted[:, None])[:, 0]
