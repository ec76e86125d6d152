"""Causal generators: tokens are fed in an order, each seeing only what came before, with a key-value cache.

What a family is, its `Order` says: which positions a step draws, what is visible, and which hidden state each head
reads for them. A new generator says how ids become embeddings, and how hidden states become logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.losses import Losses, weigh
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Batch, Condition, Decoding, Generator
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.orders import Order, Turn
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Sight
from varzoo.predictions.base import Prediction
from varzoo.predictions.categorical import Categorical


class CausalPlan(ABC):
    """Which decoding a causal generator opens, where it is not the plain one."""

    def check(self, generator: CausalGenerator) -> None:  # noqa: B027 (most plans fit any)
        """Raise ValueError if the plan does not fit the generator; `open` checks the batch's part of it."""

    @abstractmethod
    def open(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None) -> Decoding:
        """Open it. Raises ValueError if the plan does not fit the generator."""


@dataclass(frozen=True)
class Prefix(CausalPlan):
    """A plan: draw the first `tokens` of a sequence, and stop.

    They are the first of what would be drawn without a plan: schedules see the whole sequence's steps.
    """

    tokens: int

    def open(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None) -> CausalDecoding:
        return CausalDecoding(generator, condition, guidance, self.within(generator))

    def check(self, generator: CausalGenerator) -> None:
        self.within(generator)

    def within(self, generator: CausalGenerator) -> int:
        """The number of tokens, if the generator can stop there; ValueError if it cannot."""
        if not generator.spec.prefix_decodes:
            raise ValueError(f"no prefix of {generator.spec} decodes, so all of it is drawn; it takes no plan, got "
                             f"{self}.")
        if not 1 <= self.tokens <= generator.spec.length:
            raise ValueError(f"a prefix has between 1 and {generator.spec.length} tokens, got {self.tokens}.")
        return self.tokens


@dataclass(frozen=True, eq=False)
class Completion(CausalPlan):
    """A plan: keep the tokens that are given, draw the others in the generator's order.

    What is given is seen when its turn comes, so only what is drawn later knows of it: exact where the first positions
    of the order are given, and a constraint that earlier positions do not foresee elsewhere.

    Args:
        tokens: `[B, N]` or `[B, N, D]` in raster order, or one row `[1, ...]` for all samples; read where known.
        known: `[B, N]`, `[1, N]` or `[N]` bool.
    """

    tokens: Tensor
    known: Tensor

    def open(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None) -> CausalDecoding:
        return CausalDecoding(generator, condition, guidance, generator.spec.length, self)

    def of_batch(self, size: int, spec: TokenSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens `[B, N, ...]`, 0 where not known, and known positions `[B, N]`.

        Raises:
            ValueError: they do not fit the tokens of the spec or the batch.
        """
        ids = (spec.length,) if spec.depth == 1 else (spec.length, spec.depth)
        tokens, known = self.tokens.to(device), self.known.to(device)
        if known.dtype != torch.bool or known.shape[-1:] != ids[:1] or tokens.shape[1:] != ids:
            raise ValueError(f"a completion of {spec} needs tokens [B, {', '.join(map(str, ids))}] and a boolean mask "
                             f"[B, {spec.length}], got {list(tokens.shape)} and {known.dtype} {list(known.shape)}.")
        if len(tokens) not in (1, size) or known.shape[:-1] not in ((), (1,), (size,)):
            raise ValueError(f"a completion is given for every sample or once for all; for {size} samples there are "
                             f"tokens {list(tokens.shape)} and a mask {list(known.shape)}.")
        known = known.expand(size, -1)
        tokens = tokens.expand(size, *ids).masked_fill(~known.view(*known.shape, *(1,) * (len(ids) - 1)), 0)
        if tokens.min() < 0 or tokens.max() >= spec.size:
            raise ValueError(f"given ids must lie in 0 to {spec.size - 1}, got {int(tokens.min())} to "
                             f"{int(tokens.max())}.")
        if known.all():
            raise ValueError("all tokens are given, so there is nothing to draw: decode them.")
        return tokens.long(), known


class CausalGenerator(Generator):
    """Base of generators that feed tokens causally after prefix tokens.

    Subclasses have a `conditioner`, an `order` and the `width` of embeddings and features. Heads are numbered as in
    `order.sources`; where several predict a position, their logits are averaged.
    """

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": Categorical}

    conditioner: Conditioner
    order: Order
    width: int

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Ids `[B, m k]` or, of depth D, `[B, m k, D]`, cell by cell -> embeddings `[B, m, width]`."""

    @abstractmethod
    def run(self, x: Tensor, places: slice | Tensor, *, sight: Sight, cache: KVCache | None = None,
            slots: Tensor | None = None) -> list[Tensor]:
        """Embeddings `[B, n, width]` -> hidden states `[B, n, width]`, one per head.

        Args:
            places: where the tokens are in the order, prefix tokens and then cells as drawn; a range, or `[B, n]` (of
                generators that offer "verify"), which may go past the last cell.
            slots: `[B, n]` of the cache; by default the places.
        """

    @abstractmethod
    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        """An empty cache of all slots, and some more."""

    def project(self, head: int, features: Tensor) -> Tensor:
        """Features `[B, n, width]` of positions -> logits `[B, n, V]` or `[B, n, D, V]`, by an affine map.

        Generators have one unless they make a `prediction` of their own, as RQ-Transformer does.
        """
        raise TypeError(f"{type(self).__name__} has no map from features to logits: its prediction is "
                        f"{self.predicts['main'].__name__}.")

    def features(self, head: int, hidden: Tensor) -> Tensor:
        """Hidden states `[B, m, width]` that a head reads -> features `[B, m k, width]` of the ids it predicts."""
        return hidden

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]  # follows from its parts
        """"verify", where a step draws one cell from the one before it, by logits: drafts can be verified in a row."""
        one_by_one = set(self.order.sizes) == {1} and len(self.order.sources) == 1
        return frozenset({"verify"}) if one_by_one and self.predicts["main"] is Categorical else frozenset()

    def lacks(self, ability: str) -> str:
        if ability != "verify" or self.predicts["main"] is not Categorical:
            return super().lacks(ability)
        return (f"a step of {type(self).__name__} draws up to {max(self.order.sizes)} cells at once, so a draft of the "
                "steps after it would have to be right in every one of them")

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]  # follows from its parts
        return self.conditioner.num_classes

    def check_condition(self, condition: Condition) -> None:
        self.conditioner.check(condition)
        super().check_condition(condition)

    def sight(self, length: int, valid: Tensor | None, device: torch.device) -> Sight:
        """What each of the first `length` slots sees: what was known in its turn, without the padding of captions.

        A padded token (`valid` `[B, T]` False) is hidden from all but itself, or see `Conditioner.padding_sees`.
        """
        visible = self.order.visible(length)
        if valid is None:
            return Sight(causal=True) if visible is None else Sight(mask=visible.to(device))
        if visible is None:
            visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible, keys = visible.to(device), known_keys(valid, length)
        if self.conditioner.padding_sees == "crossed":
            return Sight(mask=torch.where(keys.mT, visible & keys, visible ^ keys))
        return Sight(mask=(visible & keys) | torch.eye(length, dtype=torch.bool, device=device))

    def hidden(self, ids: Tensor, condition: Condition, dropped: Tensor | None = None) -> list[Tensor]:
        """Teacher-forced hidden states `[B, T + m, width]`, one per head.

        Args:
            ids: `[B, m k]` of the first m cells, as drawn.
            condition: of the prefix; samples where `dropped` `[B]` is True get the null condition.
        """
        x = torch.cat([self.conditioner(condition, dropped), self.embed(ids)], dim=1)
        length = x.shape[1]
        return self.run(x, slice(0, length), sight=self.sight(length, condition.mask, x.device))

    def logits(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `[B, N, V]`, float32, given all tokens `[B, N]`; both in raster order."""
        turn = self.order.everything.to(tokens.device)
        return self.merge(self.read(self.hidden(tokens[:, turn.ids], condition, dropped), turn), turn)

    def read(self, hidden: Sequence[Tensor], turn: Turn) -> list[Tensor]:
        """Of what was fed before a turn, the features that each head reads for the turn's positions, ascending."""
        features = [self.features(head, states[:, reading.at])
                    for head, (states, reading) in enumerate(zip(hidden, turn.readings))]
        return [part if reading.pick is None else part[:, reading.pick]
                for part, reading in zip(features, turn.readings)]

    def merge(self, features: Sequence[Tensor], turn: Turn) -> Tensor:
        """Logits `[B, n, V]`, float32, of a turn's positions: the mean over the heads that predict each."""
        parts = [self.project(head, part).float() for head, part in enumerate(features)]
        if turn.share is None:
            return parts[0]
        logits = parts[0].new_zeros(len(parts[0]), len(turn.positions), parts[0].shape[-1])
        for part, reading in zip(parts, turn.readings):
            logits = logits.add_(part) if reading.to is None else logits.index_add_(1, reading.to, part)
        return logits.mul_(turn.share)

    def prediction(self, features: Sequence[Tensor], turn: Turn, positions: Tensor) -> Prediction:
        """What the (guided) features of a turn say about its positions `[B, n]`."""
        return Categorical(logits=self.merge(features, turn), positions=positions)

    def teach(self, batch: Batch, draws: AnyDraws) -> Tensor:
        """Teacher-forced logits of a training batch, some of its conditions dropped."""
        self.check_condition(batch.condition)
        dropped = draws.uniform("drop_condition") < self.conditioner.drop
        return self.logits(batch.tokens, batch.condition, dropped)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Mean cross-entropy over all tokens, in nats; samples are weighted by `batch.weights`."""
        return weigh({"cross_entropy": cross_entropy(self.teach(batch, draws), batch.tokens)}, batch.weights)

    def check_plan(self, plan: Any) -> None:
        if isinstance(plan, CausalPlan):
            plan.check(self)
        elif plan is not None:
            prefix = "Prefix(tokens=...), " if self.spec.prefix_decodes else ""
            raise ValueError(f"the order of {type(self).__name__} is fixed, so it takes no plan, got {plan}. Leave it "
                             f"out: plan=null, as in sampler=categorical. What fits besides: {prefix}Completion(...).")

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> Decoding:
        """Open a decoding; `plan` is None or a CausalPlan: Completion, Ragged, or Prefix where any prefix decodes."""
        self.check_condition(condition)
        self.check_plan(plan)
        if plan is None:
            return CausalDecoding(self, condition, of_phase(guidance), self.spec.length)
        return plan.open(self, condition, of_phase(guidance))


def known_keys(valid: Tensor, length: int) -> Tensor:
    """Which of the first `length` slots are not padding, `[B, 1, 1, length]`, given that of the prefix `[B, T]`."""
    return F.pad(valid, (0, length - valid.shape[1]), value=True)[:, None, None]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the tokens of each sample, `[B]`, of logits `[B, N, (D,) V]` against ids `[B, N, (D)]`."""
    losses = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(dim=1)


class OpenDecoding(Decoding):
    """What decodings of a causal generator begin with.

    Args:
        generator, condition, guidance: as given to `begin`.
        count: tokens to draw.
        known: `[B, N]` what is known from the beginning. Steps that would draw nothing else are left out; the others
            keep their numbers, so that schedules see the whole sequence's.

    Attributes:
        planned: the steps.
        branches: 2 where there is a null branch, else 1.
        prefix: `[branches B, T, width]` embedded prefix tokens, conditional first.
        valid: `[branches B, T]` which of them are not padding, None if all.
    """

    def __init__(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None, count: int,
                 known: Tensor | None = None) -> None:
        self.generator, self.guidance, self.count = generator, guidance, count
        self.device = next(generator.parameters()).device
        self.turns = generator.order.on(self.device)
        self.planned = list(self._steps(condition.size, known))
        guided = needs_null_branch(guidance, self.planned)
        condition = condition.to(self.device)
        branches = [condition, generator.conditioner.null(condition)] if guided else [condition]
        self.branches = len(branches)
        self.prefix = torch.cat([generator.conditioner(branch) for branch in branches])
        self.valid = None if condition.mask is None else condition.mask.repeat(self.branches, 1)

    def _steps(self, size: int, known: Tensor | None) -> Iterator[Step]:
        total, drawn = self.generator.spec.length, 0
        for index, turn in enumerate(self.turns):
            if drawn >= self.count:
                return
            drawn += len(turn.positions)
            if known is None or not known[:, turn.positions].all():
                yield Step(index=index, of=len(self.turns), drawn=drawn - len(turn.positions), left=total - drawn,
                           total=total, positions=turn.positions.expand(size, -1))


class CausalDecoding(OpenDecoding):
    """One batch of a causal generator being drawn: its tokens, its cache and the tokens not fed yet.

    Args:
        generator, condition, guidance, count: see `OpenDecoding`; `tokens` has as many.
        given: what is known from the beginning.
    """

    def __init__(self, generator: CausalGenerator, condition: Condition, guidance: Schedule | None, count: int,
                 given: Completion | None = None) -> None:
        ids = (count,) if generator.spec.depth == 1 else (count, generator.spec.depth)
        device = next(generator.parameters()).device
        self.tokens, self._known = torch.zeros(condition.size, *ids, dtype=torch.long, device=device), None
        if given is not None:
            self.tokens, self._known = given.of_batch(condition.size, generator.spec, device)
        super().__init__(generator, condition, guidance, count, self._known)
        self._place = {step.index: place for place, step in enumerate(self.planned)}
        self._cache = generator.new_cache(len(self.prefix))
        self._keys = None if self.valid is None else known_keys(self.valid, self._cache.slots)
        self._done = 0

    @property
    def steps(self) -> Iterator[Step]:
        while self._done < len(self.planned):
            yield self.planned[self._done]

    def predict(self, step: Step) -> Prediction:
        turn = self.turns[step.index]
        features = self.generator.read(self._feed(step), turn)
        if self.branches == 2:
            # Heads are affine, so guided features give guided logits, at half the work of guiding the logits.
            assert self.guidance is not None, "a null branch is there for guidance"
            scale = self.guidance(step)
            features = [guide(part, scale) for part in features]
        return self.generator.prediction(features, turn, step.positions)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        positions = step.positions.view(*step.positions.shape, *(1,) * (tokens.ndim - 2)).expand_as(tokens)
        if self._known is not None:
            known = self._known.gather(1, step.positions).view(*step.positions.shape, *(1,) * (tokens.ndim - 2))
            tokens = torch.where(known, self.tokens.gather(1, positions), tokens)
        self.tokens.scatter_(1, positions, tokens)
        self._done = self._place[step.index] + 1

    def _feed(self, step: Step) -> list[Tensor]:
        """Feed what came since the step drawn before (the prefix before the first); returns the turn's hidden states.

        That is what it drew, and what was given in turns left out. A second call writes the same slots again.
        """
        place, turn = self._place[step.index], self.turns[step.index]
        before = self.planned[place - 1].index if place else -1
        turns = self.turns[before + 1:step.index + 1]
        start, reach = turns[0].fed[0], turn.fed[1]
        self._cache.reach = reach
        ids = torch.cat([other.ids for other in turns])
        parts = [self.prefix] if start == 0 else []
        if len(ids):
            parts.append(self.generator.embed(torch.cat([self.tokens[:, ids]] * self.branches)))
        x = torch.cat(parts, dim=1)
        if start == 0:
            sight = self.generator.sight(reach, self.valid, x.device)
        elif len(turns) == 1:
            # Everything in the cache was known before, or becomes known now: only padding is hidden.
            sight = Sight(mask=None if self._keys is None else self._keys[..., :reach])
        else:
            visible = self.generator.order.turn[:reach]
            visible = (visible <= visible[start:, None]).to(x.device)
            sight = Sight(mask=visible if self._keys is None else visible & self._keys[..., :reach])
        hidden = self.generator.run(x, slice(start, reach), sight=sight, cache=self._cache)
        return [states[:, turn.fed[0] - start:] for states in hidden]


def guide(features: Tensor, scale: float) -> Tensor:
    """null + scale (conditional - null) `[B, ...]` of features `[2 B, ...]`, conditional first; exact at scale 1."""
    conditional, null = features.chunk(2)
    return conditional if scale == 1 else torch.lerp(null.float(), conditional.float(), scale).to(features.dtype)
