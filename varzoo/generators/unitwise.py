"""Unit-wise generation by flow: one transformer, causal over units, and a flow that draws a whole unit at each step.

What xAR and FlowAR have in common: the parts of the model around the velocity, and the state of a decoding. They differ
in what is fed as a unit and in which network is the velocity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Ignore, Rename, Rule
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Condition, Decoding, Generator
from varzoo.generators.units import Unit
from varzoo.nn.modulated_transformer import ModulatedTransformer, modulated_transformer_rules
from varzoo.predictions.base import Prediction
from varzoo.predictions.flow import FlowPrediction


class UnitGenerator(Generator):
    """Base of generators that draw a grid of continuous tokens unit after unit by a flow (xAR, FlowAR).

    Args:
        spec: continuous tokens on a grid (h, w).
        num_classes: class labels it knows; the label after them is the null class.
        unit: what is drawn in one step.
        width, heads: of the transformer.
        encoder_depth, decoder_depth: blocks of its two stacks.
        mlp_ratio: hidden width of an MLP over the width, of which GEGLU has two thirds.
        class_drop: probability that a sample is trained without its class.
        attention_dropout: on the transformer's attention weights.
        projection_dropout: after its attention projections and in its MLPs.
    """

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": FlowPrediction}

    num_classes: int
    turn: Tensor
    visible: Tensor

    def __init__(self, *, spec: TokenSpec, num_classes: int, unit: Unit, width: int, heads: int, encoder_depth: int,
                 decoder_depth: int, mlp_ratio: float, class_drop: float, attention_dropout: float,
                 projection_dropout: float) -> None:
        super().__init__()
        name = type(self).__name__
        if spec.kind != "continuous" or len(spec.shape) != 2:
            raise ValueError(f"{name} models a grid of continuous tokens, got a spec of {spec}. Choose a tokenizer "
                             "without a codebook, such as kl16.")
        if num_classes < 1 or not 0 <= class_drop <= 1:
            raise ValueError(f"need num_classes >= 1 and 0 <= class_drop <= 1, got {num_classes} and {class_drop}.")
        self.spec, self.num_classes, self.class_drop = spec, num_classes, class_drop
        self.layout = unit.layout(spec.shape)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        self.backbone = ModulatedTransformer(
            channels=spec.size, coordinates=self.layout.coordinates, width=width, heads=heads,
            encoder_depth=encoder_depth, decoder_depth=decoder_depth, mlp_ratio=mlp_ratio,
            attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        turn = self.layout.turn
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("visible", turn <= turn[:, None], persistent=False)

    @abstractmethod
    def open(self, condition: Condition, guidance: Schedule | None) -> UnitDecoding:
        """A decoding of a request that is known to be good."""

    def check_plan(self, plan: Any) -> None:
        if plan is not None:
            raise ValueError(f"the units of {type(self).__name__} are fixed, so it takes no plan, got {plan}. Leave it "
                             "out: plan=null, as in sampler=flow_ode.")

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> UnitDecoding:
        self.check_condition(condition)
        self.check_plan(plan)
        return self.open(condition, of_phase(guidance))

    def class_vectors(self, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Class vectors `[B, width]`: the null class's where there are no labels, or where `dropped` `[B]` is True."""
        labels = condition.labels
        if labels is None:
            labels = torch.full((condition.size,), self.num_classes, device=self.visible.device)
        return self.class_embed(labels if dropped is None else labels.masked_fill(dropped, self.num_classes))

    def noise_like(self, sequence: Tensor, draws: AnyDraws) -> Tensor:
        """Training noise of every slot of sequences `[B, S, C]`."""
        return draws.normal("noise", (self.spec.size,), at=self.layout.positions.expand(len(sequence), -1))

    def key_rules(self) -> list[Rule]:
        """Key map rules of the parts that all share."""
        return [Rename("class_emb.weight", "class_embed.weight"), Ignore("mask", self._official_mask),
                *modulated_transformer_rules(self.backbone)]

    def _official_mask(self) -> Tensor:
        return torch.zeros(self.visible.shape).masked_fill(~self.visible.cpu(), -torch.inf)[None, None]


class UnitDecoding(Decoding):
    """Base of decodings that draw unit after unit, with one cache for both branches.

    The cache holds some units of each branch, always the first ones. What a branch lacks is fed together with the next
    unit that it is needed for, under the mask, and never in a run of its own: a finished unit goes in with the first
    evaluation of the next, and a null branch that was idle while the scale was 1 catches up when it is wanted.

    Subclasses say what is fed of a unit. `ahead` is 1 where that is known before the unit's tokens are (FlowAR), and 0
    where it is the tokens themselves (xAR), so that only what was fed of earlier units may stay in the cache.

    Attributes:
        held: how many units of each branch, conditional and null, the cache holds.
    """

    ahead: ClassVar[int]

    def __init__(self, generator: UnitGenerator, condition: Condition, guidance: Schedule | None) -> None:
        self._backbone, self._visible, self._guidance = generator.backbone, generator.visible, guidance
        self._layout, self._bounds = generator.layout, generator.layout.bounds
        self.batch, device = condition.size, generator.visible.device
        self._plan = self._layout.steps(self.batch, device)
        self._branches = 1 + needs_null_branch(guidance, self._plan)
        conditions = (condition.to(device), Condition.nothing(self.batch))[:self._branches]
        self._vectors = torch.cat([generator.class_vectors(condition) for condition in conditions])
        self._cache = self._backbone.new_cache(len(self._vectors))
        self.held = [0] * self._branches
        # float32 whatever the weights are: rounding latents would be seen in the pixels
        self._sequence = torch.zeros(self.batch, len(self._layout.positions), generator.spec.size, device=device)
        self._done = 0

    @property
    def steps(self) -> Iterator[Step]:
        while self._done < len(self._plan):
            yield self._plan[self._done]

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # follows from the state
        return self._layout.merge(self._sequence)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        start, stop = self._bounds[step.index]
        self._sequence[:, start:stop] = tokens.to(self._sequence.dtype)
        self.held = [min(held, step.index + self.ahead) for held in self.held]
        self._done = step.index + 1

    def scale(self, step: Step) -> float:
        return 1.0 if self._guidance is None else self._guidance(step)

    def first_to_feed(self, index: int, branches: int) -> int:
        """The first unit that must be fed before unit `index` can be, so that all of the branches know what is past."""
        return min(index, *self.held[:branches])

    def run(self, x: Tensor, modulations: Sequence[Tensor], *, first: int, index: int, branches: int,
            groups: Tensor | None = None) -> Tensor:
        """Feed units `first` to `index`, embedded `[branches B, n, width]`; hidden states of the last, same shape."""
        start, stop = self._bounds[first][0], self._bounds[index][1]
        self._cache.reach = stop
        hidden = self._backbone(
            x, modulations, slots=slice(start, stop), groups=groups,
            mask=None if first == index else self._visible[start:stop, :stop],
            cache=self._cache if branches == self._branches else self._cache.first(branches * self.batch))
        self.held[:branches] = [index + self.ahead] * branches
        return hidden[:, self._bounds[index][0] - start:]
