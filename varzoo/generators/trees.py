"""Trees of tokens: what may come after what is known, as nodes that one call of a causal generator verifies.

Node 0 is the token that is known but not fed yet; a parent precedes its children. Everything about a tree follows from
its parents by gathers, for a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tree:
    """A batch of trees with the same number of nodes.

    Args:
        parents: `[B, n]` (or `[1, n]`, the same for all samples) index of each node's parent, -1 for node 0.
        levels: no node is deeper; node 0 has depth 0.
    """

    parents: Tensor
    levels: int

    @classmethod
    def chain(cls, nodes: int, device: torch.device | str = "cpu") -> Tree:
        """Every node the child of the one before."""
        return cls((torch.arange(nodes, device=device) - 1)[None], nodes - 1)

    @property
    def nodes(self) -> int:
        return self.parents.shape[1]

    @property
    def is_chain(self) -> bool:
        return self.nodes == self.levels + 1

    @cached_property
    def depth(self) -> Tensor:
        """`[B, n]` number of nodes above each."""
        return self.lineage.sum(dim=2) - 1

    @cached_property
    def lineage(self) -> Tensor:
        """`[B, n, n]` whether node j is node i or above it."""
        batch, nodes = self.parents.shape
        seen = torch.eye(nodes, dtype=torch.bool, device=self.parents.device).repeat(batch, 1, 1)
        above = self.parents
        for _ in range(self.levels):
            seen = seen.scatter(2, above.clamp(min=0)[..., None], True)  # node 0 is above all
            above = self.parents.gather(1, above.clamp(min=0))
        return seen

    def first(self, nodes: int) -> Tree:
        """The tree of the first nodes alone."""
        return Tree(self.parents[:, :nodes], min(self.levels, nodes - 1))

    def below(self, count: int) -> Tree:
        """This tree hung under the last of `count` further nodes in a row."""
        line = torch.arange(count, device=self.parents.device).expand(len(self.parents), -1) - 1
        return Tree(torch.cat([line, self.parents + count], dim=1), self.levels + count)

    def children(self, tokens: Tensor | None = None) -> Tensor:
        """`[B, n, c]` each node's children in ascending order, -1 where there are no more.

        Given the nodes' tokens `[B, n]`, nodes with the same tokens from the root on are one: the first of them has
        the children of all, the others have none.
        """
        parents = self.parents.clamp(min=0)
        if tokens is not None:
            parents = self._first_alike(tokens).gather(1, parents.expand(len(tokens), -1))
        nodes = torch.arange(self.nodes, device=parents.device)
        brothers = (parents[:, :, None] == parents[:, None]) & (nodes > 0)[:, None] & (nodes > 0)
        place = (brothers & (nodes < nodes[:, None])).sum(dim=2)  # among the brothers
        fanout = int(place.max()) + 1
        table = torch.full((len(parents), self.nodes * fanout + 1), -1, device=parents.device)
        target = torch.where(nodes > 0, parents * fanout + place, self.nodes * fanout)  # node 0 is nobody's child
        return table.scatter(1, target, nodes.expand_as(target))[:, :-1].unflatten(1, (self.nodes, fanout))

    def _first_alike(self, tokens: Tensor) -> Tensor:
        """`[B, n]` the first node with the same tokens from the root on."""
        parents = self.parents.clamp(min=0).expand(len(tokens), -1)
        equal = (tokens[:, :, None] == tokens[:, None]) & (self.depth[:, :, None] == self.depth[:, None])
        alike = equal
        for _ in range(self.levels):  # equal here, and alike above
            above = alike.gather(1, parents[:, :, None].expand_as(alike))
            alike = equal & above.gather(2, parents[:, None].expand_as(alike))
        return alike.int().argmax(dim=2)
