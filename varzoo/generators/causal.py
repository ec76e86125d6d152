"""Causal generators: tokens are fed in an order, each seeing only what came before, with a key-value cache.

An `Order` says which raster positions are drawn in which step and when each cache slot became known; visibility is one
rule, `turn[key] <= turn[query]`, for the training mask and for decoding alike. Raster and 1-D orders, Manhattan shells
and blocks are orders; nothing else tells those families apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Condition, Decoding, Generator
from varzoo.generators.conditioners import Conditioner
from varzoo.nn.llama import LlamaStack
from varzoo.predictions.base import Prediction
from varzoo.predictions.categorical import Categorical


@dataclass(frozen=True)
class Order:
    """The order in which the N positions are drawn, and what each slot may see.

    Args:
        steps: raster positions `[n_s]` drawn in each step, ascending.
        turn: `[T + N]` turn of each slot: the T prefix slots, then position p at slot T + p.
    """

    steps: tuple[Tensor, ...]
    turn: Tensor

    @classmethod
    def raster(cls, prefix: int, length: int) -> Order:
        """One position per step, in raster order, after a causal prefix."""
        return cls(steps=tuple(torch.arange(length).split(1)), turn=torch.arange(prefix + length))

    def visible(self, slots: Tensor, reach: int) -> Tensor:
        """Which of the first `reach` slots the given slots `[n]` see, boolean `[n, reach]`."""
        return self.turn[:reach] <= self.turn[slots][:, None]


class CausalGenerator(Generator):
    """Base of generators that feed tokens causally through a LlamaStack after prefix tokens.

    Subclasses set `conditioner`, `stack`, `order` and `rotary` (rows `[T + N, head_dim / 2, 2]`), and say how tokens
    become embeddings and hidden states become logits.
    """

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": Categorical}

    conditioner: Conditioner
    stack: LlamaStack
    order: Order
    rotary: Tensor

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, n]` -> embeddings `[B, n, width]`."""

    @abstractmethod
    def step_logits(self, hidden: Tensor, step: Step) -> Tensor:
        """Hidden states of the slots fed last `[B, m, width]` -> logits `[B, n, V]` of the step's positions."""

    @property
    def num_classes(self) -> int | None:
        return self.conditioner.num_classes

    def check_condition(self, condition: Condition) -> None:
        if condition.features is not None and self.num_classes is not None:
            raise ValueError(f"{type(self).__name__} here is class-conditional, but text features were given.")
        super().check_condition(condition)

    def hidden(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Teacher-forced hidden states `[B, T + m, width]` of the prefix and the first m tokens `[B, m]`."""
        prefix = self.conditioner(condition, dropped)
        x = torch.cat([prefix, self.embed(tokens)], dim=1)
        mask = self.mask(torch.arange(x.shape[1]), x.shape[1], condition.mask)
        return self.stack(x, self.rotary[:x.shape[1]], mask=mask)

    def mask(self, slots: Tensor, reach: int, valid: Tensor | None) -> Tensor | None:
        """Attention mask of the slots fed, `[n, reach]` or `[B, 1, n, reach]`; None where plain causality says it all.

        Padding of a caption (`valid` `[B, T]` False) is hidden from all slots but itself.
        """
        visible = self.order.visible(slots, reach)
        device = self.rotary.device
        if valid is None:
            causal = torch.ones_like(visible).tril(reach - len(slots))
            # A single query that sees all, or queries from slot 0 on that see causally, need no mask.
            plain = torch.equal(visible, causal) and (len(slots) == 1 or len(slots) == reach)
            return None if plain else visible.to(device)
        keys = torch.ones(len(valid), reach, dtype=torch.bool, device=device)
        keys[:, :valid.shape[1]] = valid
        itself = slots[:, None] == torch.arange(reach)
        return ((visible.to(device) & keys[:, None]) | itself.to(device))[:, None]

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> CausalDecoding:
        self.check_condition(condition)
        if plan is not None:
            raise ValueError(f"the order of {type(self).__name__} is fixed, so it takes no plan, got {plan}.")
        return CausalDecoding(self, condition, of_phase(guidance))


class CausalDecoding(Decoding):
    """One batch of a causal generator being drawn: its tokens, its cache and the tokens not fed yet."""

    def __init__(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None) -> None:
        order, self.generator, self.guidance = generator.order, generator, guidance
        device = generator.rotary.device
        total = generator.spec.length
        drawn = 0
        self._plan: list[Step] = []
        for index, positions in enumerate(order.steps):
            left = total - drawn - len(positions)
            self._plan.append(Step(index=index, of=len(order.steps), drawn=drawn, left=left, total=total,
                                   positions=positions.expand(condition.size, -1).to(device)))
            drawn += len(positions)
        guided = needs_null_branch(guidance, self._plan)

        condition = condition.to(device)
        branches = [condition, generator.conditioner.null(condition)] if guided else [condition]
        self._branches = len(branches)
        self._prefix = torch.cat([generator.conditioner(branch) for branch in branches])
        self._valid = None if condition.mask is None else condition.mask.repeat(self._branches, 1)
        self._cache = generator.stack.new_cache(len(self._prefix), self._prefix.shape[1] + total)
        self._done = 0
        self.tokens = torch.zeros(condition.size, total, dtype=torch.long, device=device)

    @property
    def steps(self) -> Iterator[Step]:
        while self._done < len(self._plan):
            yield self._plan[self._done]

    def predict(self, step: Step) -> Categorical:
        logits = self.generator.step_logits(self._feed(step), step)
        if self._branches == 2:
            conditional, null = logits.chunk(2)
            scale = self.guidance(step)
            logits = conditional if scale == 1 else null + scale * (conditional - null)
        return Categorical(logits=logits, positions=step.positions)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        self.tokens.scatter_(1, step.positions, tokens)
        self._done = step.index + 1

    def _feed(self, step: Step) -> Tensor:
        """Feed what the step before drew (the prefix before the first); a second call writes the same slots again."""
        prefix = self._prefix.shape[1]
        if step.index == 0:
            x, slots = self._prefix, torch.arange(prefix)
        else:
            positions = self.generator.order.steps[step.index - 1]
            tokens = self.tokens[:, positions.to(self.tokens.device)].repeat(self._branches, 1)
            x, slots = self.generator.embed(tokens), prefix + positions
        self._cache.reach = int(slots.max()) + 1
        mask = self.generator.mask(slots, self._cache.reach, self._valid)
        slots = slots.to(x.device)
        return self.generator.stack(x, self.generator.rotary[slots], mask=mask, cache=self._cache, slots=slots)
