"""Causal decodings in which samples come on at their own pace: drafts are verified in one call, and some of them kept.

    decoding = generator.begin(condition, draws=draws, guidance=guidance, plan=Ragged(nodes=59))
    outlook = decoding.prefill()                  # after the prefix: logits and features
    decoding.admit(first)                         # a cell that is known, and not fed yet
    outlook = decoding.verify(ids, tree)          # of all nodes; nothing visible has changed
    decoding.keep(path, following)                # nodes that stay, and what comes after them

The i-th node of a tree is fed at slot length + i, where length is how many slots of a sample are filled; its place in
the order (rotary row, step of guidance) follows from its depth. Keeping a path moves its keys and values together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Condition
from varzoo.generators.causal import CausalGenerator, CausalPlan, OpenDecoding, Prefix, known_keys
from varzoo.generators.trees import Tree
from varzoo.nn.llama import Sight
from varzoo.predictions.categorical import Categorical


@dataclass(frozen=True, kw_only=True)
class Ragged(CausalPlan):
    """A plan: drafts are verified, at each sample's own pace.

    Args:
        nodes: how many nodes a tree may have.
        levels: how deep it may be; drafts may go that far past the last cell.
        prefix: draw the first tokens alone, where any prefix of them decodes.
    """

    nodes: int
    levels: int
    prefix: Prefix | None = None

    def check(self, generator: CausalGenerator) -> None:
        if "verify" not in generator.offers:
            raise ValueError(f"drafts for {type(generator).__name__} cannot be verified, since "
                             f"{generator.lacks('verify')}.")
        if self.prefix is not None:
            self.prefix.check(generator)

    def open(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None) -> RaggedDecoding:
        self.check(generator)
        count = generator.spec.length if self.prefix is None else self.prefix.within(generator)
        return RaggedDecoding(generator, condition, guidance, count, self)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the target says after each node.

    Args:
        logits: `[B, n, w, V]` guided logits, float32, of the w ids of the next cell.
        features: `[branches, B, n, width]` hidden states that they come from, conditional first.
    """

    logits: Tensor
    features: Tensor


class RaggedDecoding(OpenDecoding):
    """One batch of a causal generator whose steps draw one cell each.

    Attributes:
        known: `[B]` how many cells are known; the last of them is not fed yet.
        length: `[B]` how many slots of the cache are filled.
        count: tokens to draw. Cells past the last may be known, too; `tokens` has none of them.
        width: ids of a cell.
    """

    def __init__(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None, count: int,
                 plan: Ragged) -> None:
        super().__init__(generator, condition, guidance, count)
        device, batch, self.plan = self.device, condition.size, plan
        self.cells = len(self.planned)
        self.positions = generator.order.positions.to(device)
        self.width = self.positions.shape[1] * generator.spec.depth
        scales = [1.0 if guidance is None else guidance(step) for step in self.planned]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self._cache = generator.new_cache(len(self.prefix), plan.nodes + plan.levels + 1)
        self.known = torch.zeros(batch, dtype=torch.long, device=device)
        self.length = torch.zeros_like(self.known)
        self._ids = torch.zeros(batch, self.cells + plan.levels + 2, self.width, dtype=torch.long, device=device)
        self._fed: Tensor | None = None

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # follows from the state
        drawn = self._ids[:, :self.cells].unflatten(2, (-1, self.generator.spec.depth))
        ahead = torch.arange(self.cells, device=drawn.device) >= self.known[:, None]
        drawn = drawn.masked_fill(ahead[..., None, None], 0)
        tokens = torch.zeros(len(drawn), self.count, self.generator.spec.depth, dtype=torch.long, device=drawn.device)
        tokens[:, self.positions[:self.cells].flatten()] = drawn.flatten(1, 2)
        return tokens[..., 0] if self.generator.spec.depth == 1 else tokens

    @property
    def steps(self) -> Iterator[Step]:
        """The steps of the sample that has come least far."""
        while (done := int(self.known.min())) < self.cells:
            yield self.planned[done]

    def predict(self, step: Step) -> Categorical:
        """What is likely next, where all samples have come equally far."""
        if (self.known != step.index).any():
            raise ValueError(f"step {step.index} is not the next of every sample (they know {self.known.tolist()} "
                             "cells): verify drafts instead of predicting a step.")
        if step.index == 0:
            outlook = self.prefill()
        else:
            outlook = self.verify(self.pending[:, None], Tree.chain(1, self.known.device))
        ids = outlook.logits[:, -1]
        return Categorical(logits=ids if self.generator.spec.depth == 1
                           else ids.unflatten(1, (-1, self.generator.spec.depth)), positions=step.positions)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        cell = tokens.reshape(len(tokens), self.width)
        if step.index == 0:
            self.known.zero_()
            self.admit(cell)
        else:
            self.keep(torch.zeros(len(cell), 1, dtype=torch.long, device=cell.device), cell)

    @property
    def pending(self) -> Tensor:
        """`[B, w]` the last known cell, which is not fed yet."""
        return self.cell(self.known - 1)

    def cell(self, index: Tensor) -> Tensor:
        """The ids `[B, (n,) w]` of the cells with the given index `[B, (n)]`, as drawn."""
        return self._ids[torch.arange(len(index), device=index.device).view(-1, *(1,) * (index.ndim - 1)), index]

    def positions_of(self, cells: Tensor) -> Tensor:
        """Raster positions `[B, k]` of cells `[B]`; those past the last get positions of their own."""
        past = (cells - len(self.positions) + 1).clamp(min=0)[:, None]
        return self.positions[cells.clamp(max=len(self.positions) - 1)] + past * self.positions.shape[1]

    def prefill(self) -> Outlook:
        """Feed the prefix: what is likely at the first cell (logits after the last prefix token) and all features."""
        prefix = self.prefix
        self._cache.reach = prefix.shape[1]
        sight = self.generator.sight(prefix.shape[1], self.valid, prefix.device)
        hidden = self.generator.run(prefix, slice(0, prefix.shape[1]), sight=sight, cache=self._cache)[0]
        self.length.fill_(prefix.shape[1])
        features = hidden.unflatten(0, (self.branches, -1))
        return Outlook(logits=self.score(features[:, :, -1:], self.known[:, None]), features=features)

    def admit(self, cell: Tensor) -> None:
        """Take the ids `[B, w]` of the first cell."""
        self._ids[:, 0] = cell
        self.known.fill_(1)

    def verify(self, ids: Tensor, tree: Tree, start: int = 0) -> Outlook:
        """What is likely after each node of a tree. Known cells stay as they are, and verifying again is as if anew.

        Args:
            ids: `[B, n, w]`; node 0 is the pending cell.
            tree: of n nodes.
            start: nodes before it were fed by the call before and need not be fed again.

        Returns:
            The outlook after nodes `start` to n - 1.

        Raises:
            ValueError: there are more nodes or levels than the plan allows.
        """
        if tree.nodes > self.plan.nodes or tree.levels > self.plan.levels:
            raise ValueError(f"a tree of {tree.nodes} nodes and {tree.levels} levels exceeds the plan's "
                             f"{self.plan.nodes} and {self.plan.levels}.")
        batch, nodes = ids.shape[:2]
        self._fed = ids
        fed = slice(start, nodes)
        depth = tree.depth.expand(batch, -1)[:, fed]
        node = torch.arange(nodes, device=ids.device)
        self._cache.reach = int(self.length.max()) + nodes
        mask = self._visible(tree.lineage.expand(batch, -1, -1)[:, fed])
        depths = () if self.generator.spec.depth == 1 else (self.generator.spec.depth,)
        x = self.generator.embed(ids[:, fed].reshape(batch, -1, *depths))
        each = lambda tensor: tensor.repeat(self.branches, *(1,) * (tensor.ndim - 1))  # noqa: E731
        hidden = self.generator.run(each(x), each(self.length[:, None] + depth), sight=Sight(mask=each(mask)),
                                    cache=self._cache, slots=each(self.length[:, None] + node[fed]))[0]
        features = hidden.unflatten(0, (self.branches, -1))
        return Outlook(logits=self.score(features, self.known[:, None] + depth), features=features)

    def score(self, features: Tensor, cells: Tensor) -> Tensor:
        """Guided logits `[B, n, w, V]` of cells `[B, n]` from hidden states `[branches, B, n, width]` before them.

        They may be a drafter's: guidance is that of each cell's own step.
        """
        parts = self.generator.features(0, features.flatten(0, 1)).unflatten(0, features.shape[:2])
        guided = parts[0]
        if self.branches == 2:
            scale = self._scales[cells.clamp(max=self.cells - 1)].repeat_interleave(parts.shape[2] // cells.shape[1],
                                                                                   dim=1)
            guided = torch.lerp(parts[1].float(), parts[0].float(), scale[..., None]).to(parts.dtype)
        logits = self.generator.project(0, guided).float()
        return logits.reshape(*cells.shape, self.width, -1)

    def keep(self, path: Tensor, following: Tensor) -> None:
        """Keep nodes of the tree that was verified last, and take what comes after them.

        Args:
            path: `[B, m]` node 0 and a descending path from it, -1 after its end; a row of -1 changes nothing.
            following: `[B, w]` ids of the cell after the path's last.
        """
        count = (path >= 0).sum(dim=1)
        place = torch.arange(path.shape[1], device=path.device)
        slots = self.length[:, None] + torch.where(path >= 0, path, place)
        each = lambda tensor: tensor.repeat(self.branches, 1)  # noqa: E731
        self._cache.move(each(slots), each(self.length[:, None] + place))
        samples = torch.arange(len(path), device=path.device)
        assert self._fed is not None, "what is kept was verified before"
        kept = self._fed[samples[:, None], path.clamp(min=0)]
        cells = (self.known[:, None] + place - 1).clamp(min=0, max=self._ids.shape[1] - 1)
        kept = torch.where((path >= 0)[..., None], kept, self._ids[samples[:, None], cells])
        self._ids[samples[:, None], cells] = kept
        after = (self.known + count - 1).clamp(min=0)
        self._ids[samples, after] = torch.where((count > 0)[:, None], following, self._ids[samples, after])
        self.known, self.length = self.known + count, self.length + count

    def rewind(self, cells: Tensor) -> None:
        """Forget the last `cells` `[B]`; at least one stays known. Raises ValueError if there are not that many."""
        if (cells < 0).any() or (cells >= self.known).any():
            raise ValueError(f"cannot forget {cells.tolist()} of {self.known.tolist()} known cells: one stays.")
        self.known, self.length = self.known - cells, self.length - cells

    def _visible(self, lineage: Tensor) -> Tensor:
        """Which slots within reach each node sees `[B, 1, m, reach]`: all that are filled, and its own line."""
        slots = torch.arange(self._cache.reach, device=lineage.device)
        node = slots - self.length[:, None]
        line = lineage.gather(2, node.clamp(0, lineage.shape[2] - 1)[:, None].expand(-1, lineage.shape[1], -1))
        line = line & ((node >= 0) & (node < lineage.shape[2]))[:, None]
        filled = node < 0
        if self.valid is not None:
            filled = filled & known_keys(self.valid[:len(filled)], self._cache.reach)[:, 0, 0]
        return (filled[:, None] | line)[:, None]
