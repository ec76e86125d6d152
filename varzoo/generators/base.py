"""The contract of generators and decodings.

    decoding = generator.begin(condition, draws=draws, guidance=guidance, plan=plan)
    for step in decoding.steps:
        prediction = decoding.predict(step)
        drawn = prediction.draw(draws)
        decoding.commit(step, drawn.tokens, prediction.carry)
    tokens = decoding.tokens

A generator is weights alone: no cache, order or step counter lives on the module, so any number of decodings run at
once and train or eval mode never selects another computation (dropout aside). A decoding owns everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step
from varzoo.predictions.base import Prediction


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a batch is to show.

    Args:
        size: number of samples B.
        labels: `[B]` int64 class ids.
        features: `[B, T, C]` text features, with `mask` `[B, T]` (True where valid).
        ids: `[B, T]` int64 text token ids, of generators that embed text themselves.

    With none of them the batch is unconditional (the generator's null condition).
    """

    size: int
    labels: Tensor | None = None
    features: Tensor | None = None
    mask: Tensor | None = None
    ids: Tensor | None = None

    @classmethod
    def classes(cls, labels: Tensor) -> Condition:
        return cls(size=len(labels), labels=labels)

    @classmethod
    def text(cls, features: Tensor, mask: Tensor) -> Condition:
        return cls(size=len(features), features=features, mask=mask.bool())

    @classmethod
    def captions(cls, ids: Tensor) -> Condition:
        return cls(size=len(ids), ids=ids)

    @classmethod
    def nothing(cls, size: int) -> Condition:
        return cls(size=size)

    def rows(self, rows: Sequence[int]) -> Condition:
        """The condition of some of the samples."""
        take = lambda tensor: None if tensor is None else tensor[list(rows)]  # noqa: E731
        return Condition(size=len(rows), labels=take(self.labels), features=take(self.features), mask=take(self.mask),
                         ids=take(self.ids))

    def to(self, device: torch.device | str) -> Condition:
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        return Condition(size=self.size, labels=move(self.labels), features=move(self.features), mask=move(self.mask),
                         ids=move(self.ids))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch.

    Args:
        tokens: `[B, N]` ids, `[B, N, D]` ids or `[B, N, C]` values, as the generator's spec says.
        condition: what each sample shows.
        weights: `[B]` weights of the samples in the loss, None for all alike.
        extras: whatever else the data module gave and the system asks for (a second grid, soft targets, features).
    """

    tokens: Tensor
    condition: Condition
    weights: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Decoding(ABC):
    """The state of one batch being drawn.

    Attributes:
        tokens: `[B, N, ...]` in raster order; zero where not drawn yet.
    """

    tokens: Tensor

    @property
    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """A live iterator over the AR steps that are left; it may be abandoned at any step."""

    @abstractmethod
    def predict(self, step: Step) -> Prediction:
        """What is likely at `step.positions`, guidance applied. Changes nothing that a second call would notice."""

    @abstractmethod
    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        """Take the tokens drawn at `step.positions`; committing a position again overwrites it."""


class Generator(nn.Module, ABC):
    """Base of all generators.

    Attributes:
        spec: the tokens it models.
        num_classes: class labels it knows, None if it is not class-conditional.
        goldens: shell patterns of the cases in tests/goldens that hold it to the official code.
        embeds_codebook: whether it embeds codes by the tokenizer's code vectors; `use_codebook` then gives it those
            when tokenizer and generator are composed.
        needs_target: whether it learns from another generator (a drafter), its `target`; `use_target` then gives it
            that one.
        predicts: the kind of prediction per phase; samplers check their options against it.
        offers: abilities beyond the plain protocol that a sampler may need ("verify", "features", ...).
    """

    spec: TokenSpec
    num_classes: int | None
    goldens: ClassVar[tuple[str, ...]] = ()
    embeds_codebook: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    predicts: ClassVar[Mapping[str, type[Prediction]]]
    offers: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """The training loss of a batch.

        Args:
            draws: one row per sample, already keyed by the training iteration.
            progress: share of the training that is done, in [0, 1].
        """

    @abstractmethod
    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> Decoding:
        """Open a decoding.

        Args:
            condition: what to draw.
            draws: one row per sample; the decoding takes orders from it, predictions their noise.
            guidance: the scale per step (one schedule, or one per phase); None or 1 everywhere keeps no null branch.
            plan: number of steps and mask law, where the generator leaves them open (see `generators.masked`).

        Raises:
            ValueError: a label outside the known classes, a guidance scale below 1, or a plan that does not fit.
        """

    @abstractmethod
    def key_maps(self) -> dict[str, KeyMap]:
        """Official checkpoint layouts by name."""

    def use_codebook(self, codebook: Tensor) -> None:
        """Take the tokenizer's code vectors, `[K, C]` or `[D, K, C]`; they are not part of this generator's weights.

        Raises:
            ValueError: this generator embeds codes by itself (`embeds_codebook` is False), or these do not fit it.
        """
        raise ValueError(f"{type(self).__name__} embeds codes by itself and takes no codebook; give one only where "
                         "embeds_codebook is true.")

    def use_target(self, target: Generator) -> None:
        """Take the trained generator that this one learns from; it is no part of this one's weights.

        Raises:
            ValueError: this generator learns from tokens alone (`needs_target` is False), or the target does not fit.
        """
        raise ValueError(f"{type(self).__name__} learns from tokens alone and takes no target; leave target_checkpoint "
                         "out.")

    @property
    def target(self) -> Generator:
        """The generator that this one learns from. Raises ValueError if there is none."""
        raise ValueError(f"{type(self).__name__} learns from tokens alone and has no target.")

    def lacks(self, ability: str) -> str:
        """Why it does not offer an ability, in words that go on from "since"."""
        predictions = ", ".join(sorted({kind.__name__ for kind in self.predicts.values()}))
        return f"it predicts {predictions} of {self.spec}"

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter: by default to all with two or more dimensions."""
        return parameter.ndim >= 2

    def check_plan(self, plan: Any) -> None:
        """Raise ValueError, naming what fits, unless `begin` takes this plan; by default it takes none."""
        if plan is not None:
            raise ValueError(f"{type(self).__name__} draws in a fixed order, so it takes no plan, got {plan}. Leave it "
                             "out: plan=null.")

    def check_condition(self, condition: Condition) -> None:
        """Raise ValueError if a label is not one of the generator's classes."""
        if condition.labels is None:
            return
        if self.num_classes is None:
            raise ValueError(f"{type(self).__name__} here is not class-conditional, but labels were given.")
        wrong = condition.labels[(condition.labels < 0) | (condition.labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"unknown class id {int(wrong[0])}: this generator knows 0 to {self.num_classes - 1}.")
