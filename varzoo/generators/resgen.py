"""ResGen (arXiv 2412.10208): masked generation of residual codes by predicting the sum of what is masked.

A position shows its first, coarsest codes; of the others the network predicts the sum of the code vectors, by a mixture
of Gaussians, and a drawn sum is quantised level by level. So the number of steps depends on neither the positions nor
the depth of the code. No code was released; what is known of the paper and what is ours stands in docs/resgen.md.

A mask is an integer per position here: how many codes it shows, 0 to D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses, weigh
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Batch, Condition, Decoding, Generator
from varzoo.generators.masked import ConfidencePlan
from varzoo.nn.code_tables import code_tables, requantise, require_tables, sum_levels
from varzoo.nn.denoiser import FinalLayer
from varzoo.nn.diffusion_transformer import TransformerBlock
from varzoo.nn.gaussian_mixture import GaussianMixture, GaussianMixtureHead
from varzoo.nn.initial import xavier_linear
from varzoo.predictions.base import Prediction
from varzoo.predictions.mixture import MixturePrediction

CHOICES = ("confidence", "random")
LOSSES = ("bound", "likelihood")


@dataclass(frozen=True, kw_only=True)
class LevelMaskPlan(ConfidencePlan):
    """How many steps there are, how many codes are masked after each, and which are shown first.

    Args:
        steps, law: see `MaskPlan`; the codes left masked are rounded up. Steps that would show nothing are skipped.
        noise: see `ConfidencePlan`.
        choice: "confidence" shows where the vector drawn is likeliest, "random" shows any masked codes alike, which is
            the exact reverse of how training masks; noise and spread are then without effect.
        spread: by how much a position's confidence falls for each code that a step shows of it already; 0 shows
            positions as a whole, the larger the more evenly the levels grow.
    """

    choice: str = "confidence"
    spread: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choice not in CHOICES:
            raise unknown("choice of what is shown first", self.choice, CHOICES)
        if self.spread < 0:
            raise ValueError(f"the spread over positions must be at least 0, got {self.spread:g}.")

    def left(self, index: int, masked: int, total: int) -> int:
        """Codes masked after a step that starts with `masked` of them; none after the last."""
        if index == self.steps - 1:
            return 0
        return min(masked, share_of(self.law(index + 1, self.steps), total))


def share_of(share: float, total: int) -> int:
    """A share of `total` codes, rounded up; what rounding errors add to a whole number does not count."""
    return min(total, math.ceil(share * total - 1e-6))


def masked_counts(order: Tensor, count: Tensor, depth: int) -> Tensor:
    """How many codes of each position `[B, N]` are masked, if the first `count` `[B]` slots of an order are drawn.

    An order `[B, N D]` is a permutation of all slots, D for each position. Which of a position's slots are drawn does
    not matter: it is always the deepest codes that are masked. For a random order the counts are multivariate
    hypergeometric, and for falling counts they are steps of one reverse process.
    """
    drawn = order.argsort(dim=1) < count[:, None]  # by slot
    return drawn.unflatten(1, (-1, depth)).sum(dim=-1)


def shown_by_confidence(confidence: Tensor, visible: Tensor, count: int, depth: int, spread: float) -> Tensor:
    """Visible codes `[B, N]` after `count` more are shown, one at a time where confidence is greatest.

    Args:
        confidence: `[B, N]`, of every position; it falls by `spread` with each code shown.
        visible: `[B, N]` before.
    """
    levels = torch.arange(depth, device=visible.device)
    scores = (confidence[..., None] - spread * levels).masked_fill(levels >= depth - visible[..., None], -torch.inf)
    # Stable, so that among equals a position is shown as a whole, and the first position first.
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :count]
    more = torch.zeros_like(scores, dtype=torch.long).flatten(1).scatter(1, order, 1)
    return visible + more.view_as(scores).sum(dim=-1)


class ResGen(Generator):
    """A bidirectional transformer with class modulation (adaLN-zero) over positions, and a mixture head.

    Args:
        spec: discrete tokens; `depth` levels of `size` codes. Depth 1 is a plain codebook.
        num_classes: class labels it knows.
        code_channels: channels of the tokenizer's code vectors.
        width, depth, heads, mlp_ratio: of the transformer.
        components, rank, least_std: see `GaussianMixtureHead`; lengths are in units of the root mean square of the
            first level's code vectors.
        loss: "bound" trains all components that are near (see `GaussianMixture.bound`), "likelihood" is -log p itself.
        class_drop: probability that a sample is trained without its class.
    """

    num_classes: int
    codebook: Tensor | None

    embeds_codebook = True
    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": MixturePrediction}

    def __init__(self, *, spec: TokenSpec, num_classes: int, code_channels: int, width: int, depth: int, heads: int,
                 mlp_ratio: float, components: int, rank: int, least_std: float, loss: str, class_drop: float) -> None:
        super().__init__()
        if spec.kind != "discrete":
            raise ValueError(f"ResGen models discrete tokens whose code vectors add up, got {spec}. Choose a tokenizer "
                             "of residual codes, such as rq_f32.")
        if not 0 <= class_drop <= 1:
            raise ValueError(f"need 0 <= class_drop <= 1, got {class_drop}.")
        if loss not in LOSSES:
            raise unknown("loss of a mixture", loss, LOSSES)
        self.spec, self.num_classes, self.code_channels = spec, num_classes, code_channels
        self.loss_kind, self.class_drop = loss, class_drop
        self.input = nn.Linear(code_channels, width)
        self.visible_embed = nn.Embedding(spec.depth + 1, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)  # the last row is the null class
        self.positions = nn.Parameter(torch.empty(1, spec.length, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(width, width)
        self.head = GaussianMixtureHead(width=width, channels=code_channels, components=components, rank=rank,
                                        least_std=least_std)
        self.register_buffer("codebook", None, persistent=False)  # the tokenizer's, when they are composed
        self._initialise()

    def _initialise(self) -> None:
        xavier_linear((self.input, *self.blocks.modules(), self.final.linear))
        layer: Any
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for table in (self.visible_embed.weight, self.class_embed.weight, self.positions):
            nn.init.normal_(table, std=0.02)

    def use_codebook(self, codebook: Tensor) -> None:
        tables = code_tables(codebook, size=self.spec.size, channels=self.code_channels, levels=self.spec.depth)
        unit = tables[0].square().mean().sqrt().clamp(min=torch.finfo(tables.dtype).tiny)
        self.codebook = (tables / unit).to(self.positions.device)

    @property
    def tables(self) -> Tensor:
        """Code vectors `[1 or D, K, C]` of root mean square 1 in the first level."""
        return require_tables(self.codebook)

    def shown(self, visible: Tensor) -> Tensor:
        """Which codes are shown, `[B, N, D]`, where the first `visible` `[B, N]` of each position are."""
        return torch.arange(self.spec.depth, device=visible.device) < visible[..., None]

    def mixture(self, ids: Tensor, visible: Tensor, labels: Tensor) -> GaussianMixture:
        """What the sum of a position's masked code vectors is likely to be, of all positions.

        Args:
            ids: `[B, N, D]`; only those shown are read.
            visible: `[B, N]` how many codes of a position are shown.
            labels: `[B]`; `num_classes` is the null class.
        """
        total = sum_levels(self.tables, ids, self.shown(visible)).to(self.positions.dtype)
        hidden = self.input(total) + self.visible_embed(visible) + self.positions
        vector = F.silu(self.class_embed(labels))[:, None]
        block: Any
        for block in self.blocks:
            hidden = block(hidden, block.modulation(vector))
        return self.head(self.final(hidden, self.final.modulation(vector)))

    def labels(self, condition: Condition) -> Tensor:
        """Labels `[B]`, the null class where there are none."""
        if condition.labels is None:
            return torch.full((condition.size,), self.num_classes, device=self.positions.device)
        return condition.labels

    def stack(self, tokens: Tensor) -> Tensor:
        """Tokens as the spec has them -> ids `[B, N, D]`. Raises ValueError for another shape."""
        expected = (self.spec.length, self.spec.depth)[:1 + (self.spec.depth > 1)]
        if tokens.shape[1:] != expected:
            raise ValueError(f"expected ids [B, {', '.join(map(str, expected))}] for {self.spec}, got "
                             f"{list(tokens.shape)}.")
        return tokens if self.spec.depth > 1 else tokens[..., None]

    def training_mask(self, draws: AnyDraws) -> Tensor:
        """How many codes of each position `[B, N]` a training step shows.

        A share cos(pi/2 r) of a sample's codes is masked, r uniform, and which ones is drawn without replacement.
        """
        spec = self.spec
        slots = spec.length * spec.depth
        rates = torch.cos(math.pi / 2 * draws.uniform("mask_rate", dtype=torch.float64)).tolist()
        counts = torch.tensor([share_of(rate, slots) for rate in rates], device=self.positions.device)
        return spec.depth - masked_counts(draws.permutation("slots", slots), counts, spec.depth)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """The loss of the sums of masked code vectors, in nats, a mean over positions that have any masked."""
        self.check_condition(batch.condition)
        ids, visible = self.stack(batch.tokens), self.training_mask(draws)
        dropped = draws.uniform("drop_label") < self.class_drop
        labels = self.labels(batch.condition).masked_fill(dropped, self.num_classes)
        mixture = self.mixture(ids, visible, labels)
        target = sum_levels(self.tables, ids, ~self.shown(visible))
        if self.loss_kind == "likelihood":
            parts = {"likelihood": -mixture.log_density(target)}
        else:
            parts = dict(zip(("regression", "classification"), mixture.bound(target)))
        masked = visible < self.spec.depth
        return weigh({name: (part * masked).sum(dim=1) / masked.sum(dim=1).clamp(min=1)
                      for name, part in parts.items()}, batch.weights)

    def check_plan(self, plan: Any) -> None:
        if not isinstance(plan, LevelMaskPlan):
            raise ValueError("ResGen leaves the number of steps open: give plan=LevelMaskPlan(steps=...), such as 63, "
                             f"got {plan!r}.")

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> ResGenDecoding:
        self.check_condition(condition)
        self.check_plan(plan)
        return ResGenDecoding(self, condition.to(self.positions.device), draws, of_phase(guidance), plan)

    def key_maps(self) -> dict[str, KeyMap]:
        """None: nothing was published."""
        return {}


class ResGenDecoding(Decoding):
    """Every step draws the sums of all that is masked and shows some more codes of them.

    A step names all positions, since how many of a sample's are complete differs from sample to sample; those stay as
    they are. `Step.drawn`, `left` and `total` count codes.
    """

    def __init__(self, generator: ResGen, condition: Condition, draws: AnyDraws, guidance: Schedule | None,
                 plan: LevelMaskPlan) -> None:
        spec, device = generator.spec, generator.positions.device
        self.generator, self.draws, self.guidance, self.plan = generator, draws, guidance, plan
        self._plan = list(self._steps(torch.arange(spec.length, device=device).expand(condition.size, -1)))
        self._place = {step.index: place for place, step in enumerate(self._plan)}
        labels = generator.labels(condition)
        guided = needs_null_branch(guidance, self._plan)
        self._labels = [labels, torch.full_like(labels, generator.num_classes)] if guided else [labels]
        ids = torch.zeros(condition.size, spec.length, spec.depth, dtype=torch.long, device=device)
        # Ids and how many of each position are visible before every step: committing a step again starts from there.
        self._known = [(ids, torch.zeros_like(ids[..., 0]))]

    def _steps(self, positions: Tensor) -> Iterator[Step]:
        masked = total = self.generator.spec.length * self.generator.spec.depth
        for index in range(self.plan.steps):
            left = self.plan.left(index, masked, total)
            if left < masked:
                yield Step(index=index, of=self.plan.steps, positions=positions, drawn=total - masked, left=left,
                           total=total)
            masked = left

    @property
    def steps(self) -> Iterator[Step]:
        while len(self._known) <= len(self._plan):
            yield self._plan[len(self._known) - 1]

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # follows from the state
        ids = self._known[-1][0]
        return ids if self.generator.spec.depth > 1 else ids[..., 0]

    @property
    def visible(self) -> Tensor:
        """How many codes of each position `[B, N]` are drawn."""
        return self._known[-1][1]

    def predict(self, step: Step) -> MixturePrediction:
        ids, visible = self._before(step)
        mixtures = [self.generator.mixture(ids, visible, labels) for labels in self._labels]
        mixture = mixtures[0]
        if self.guidance is not None and len(mixtures) == 2:
            mixture = mixture.guided(mixtures[1], self.guidance(step))
        return MixturePrediction(mixture=mixture, positions=step.positions, redraw=step.index)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        """Quantise the sums drawn, show some of their codes and mask the rest again.

        Args:
            tokens: `[B, N, C]`, the sums of masked code vectors.
            carry: the mixture that they were drawn from.
        """
        generator, (ids, visible) = self.generator, self._before(step)
        drawn = requantise(generator.tables, tokens, ids, visible)
        if self.plan.choice == "random":
            shown = self._shown_at_random(step)
        else:
            confidence = carry.log_density(tokens)
            noise = self.plan.noise * (1 - (step.index + 1) / step.of)
            if noise:
                confidence = confidence + noise * self.draws.gumbel("confidence", at=step.positions, redraw=step.index)
            shown = shown_by_confidence(confidence, visible, step.total - step.drawn - step.left,
                                        generator.spec.depth, self.plan.spread)
        self._known[self._place[step.index] + 1:] = [(drawn * generator.shown(shown), shown)]

    def _shown_at_random(self, step: Step) -> Tensor:
        """Visible codes `[B, N]` after a step: one order of all slots, drawn once, is masked ever less far."""
        order = self.draws.permutation("slots", step.total)
        left = torch.full((len(order),), step.left, device=order.device)
        return self.generator.spec.depth - masked_counts(order, left, self.generator.spec.depth)

    def _before(self, step: Step) -> tuple[Tensor, Tensor]:
        return self._known[self._place[step.index]]
