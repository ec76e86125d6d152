"""ELM (arXiv 2410.16257): language models of binary tokens, their bits split into T groups of D: T ids per position.

Official code: Pepper-lll/LMforImageGeneration, built on LlamaGen's. `ELM` is autoregressive: a position is one token of
a LLaMA decoder, embedded as the projected concatenation of its T ids; T heads predict the next position's ids at once.
`MaskedELM` predicts masked positions from both sides, every id a token of its own, and keeps what it is surest of.

As in the official code, rotary rows of the class token are zeros, so its queries and keys vanish: autoregressively it
sees itself alone, masked it sees everything alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Concat, Ignore, KeyMap, Rename
from varzoo.core.losses import Losses, weigh
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Batch, Condition, Decoding, Generator
from varzoo.generators.causal import guide
from varzoo.generators.conditioners import ClassPrefix
from varzoo.generators.llama import LLAMA_RULES, LlamaGenerator
from varzoo.generators.masked import ConfidencePlan, require_plan
from varzoo.generators.orders import Order
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.initial import normal_weight
from varzoo.nn.llama import LlamaStack, Sight
from varzoo.nn.rotary import axial_table, zero_rows
from varzoo.predictions.base import Prediction
from varzoo.predictions.categorical import Categorical


class ELM(LlamaGenerator):
    """Next-position prediction in raster order.

    Args:
        spec: discrete grid; `depth` is the number of groups T, `size` a group's 2^D.
        conditioner: what the prefix tokens are.
        width, depth, heads, multiple_of, norm_eps, token_dropout, attention_dropout, mlp_dropout: see `LlamaGenerator`.
    """

    goldens: ClassVar[tuple[str, ...]] = ("elm/ar_*",)

    def __init__(self, *, spec: TokenSpec, conditioner: ClassPrefix, width: int, depth: int, heads: int,
                 multiple_of: int, norm_eps: float, token_dropout: float, attention_dropout: float,
                 mlp_dropout: float) -> None:
        require_grid(spec)
        rows = torch.cat([zero_rows(conditioner.length, width // heads), axial_table(spec.shape, width // heads)])
        super().__init__(spec=spec, conditioner=conditioner, order=Order.raster(conditioner.length, spec.length),
                         rows=rows, width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
                         token_dropout=token_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.embedding = nn.Embedding(spec.depth * spec.size, width)  # a table for each group
        self.projection = FewRowsLinear(spec.depth * width, width, bias=False) if spec.depth > 1 else nn.Identity()
        self.head = FewRowsLinear(width, spec.depth * spec.size, bias=False)
        self.apply(normal_weight)
        nn.init.zeros_(self.head.weight)

    def embed(self, ids: Tensor) -> Tensor:
        if self.spec.depth == 1:
            return self.embedding(ids)
        offsets = self.spec.size * torch.arange(self.spec.depth, device=ids.device)
        return self.projection(self.embedding(ids + offsets).flatten(-2))

    def project(self, head: int, features: Tensor) -> Tensor:
        logits = self.head(features)
        return logits if self.spec.depth == 1 else logits.unflatten(-1, (self.spec.depth, -1))

    def key_maps(self) -> dict[str, KeyMap]:
        groups = range(self.spec.depth)
        tables = ([Rename("tok_embedder.weight", "embedding.weight")] if self.spec.depth == 1 else
                  [Concat([f"tok_embedder.{group}.weight" for group in groups], "embedding.weight"),
                   Rename("proj.weight", "projection.weight")])
        return {"elm": KeyMap([*tables, *LLAMA_RULES, Rename("norm.weight", "stack.norm.weight"),
                               Concat([f"output.{group}.weight" for group in groups], "head.weight")])}


class MaskedELM(Generator):
    """Prediction of masked positions, all ids of a position masked or known together.

    Args:
        spec: discrete grid; `depth` is the number of groups T, `size` a group's 2^D.
        conditioner: the class token.
        width, depth, heads, multiple_of, norm_eps, token_dropout, attention_dropout, mlp_dropout: see `LlamaGenerator`.
        mask_steps: training masks a share cos(pi/2 k / mask_steps) of the positions, k drawn from 0 to mask_steps - 1.
        smoothing: of the labels.
    """

    goldens: ClassVar[tuple[str, ...]] = ("elm/mlm_*",)
    rotary: Tensor

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": Categorical}

    def __init__(self, *, spec: TokenSpec, conditioner: ClassPrefix, width: int, depth: int, heads: int,
                 multiple_of: int, norm_eps: float, token_dropout: float, attention_dropout: float, mlp_dropout: float,
                 mask_steps: int, smoothing: float) -> None:
        super().__init__()
        require_grid(spec)
        if mask_steps < 1 or not 0 <= smoothing < 1:
            raise ValueError(f"need mask_steps >= 1 and 0 <= smoothing < 1, got {mask_steps} and {smoothing}.")
        self.spec, self.conditioner, self.mask_steps, self.smoothing = spec, conditioner, mask_steps, smoothing
        self.embedding = nn.Embedding(spec.size + 1, width)  # one table for all groups; the last row is the mask
        self.dropout = nn.Dropout(token_dropout)
        self.stack = LlamaStack(width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
                                attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(spec.size + 1))
        rows = torch.cat([zero_rows(1, width // heads), axial_table(spec.shape, width // heads)])
        self.register_buffer("rotary", rows.repeat_interleave(spec.depth, dim=0), persistent=False)
        self.apply(normal_weight)

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]  # follows from its parts
        return self.conditioner.num_classes

    def logits(self, tokens: Tensor, masked: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Logits `[B, N, T, V]`, float32, of all positions, given tokens `[B, N, T]` where `masked` `[B, N]` is False.

        With T = 1, tokens are `[B, N]` and logits `[B, N, V]`.
        """
        ids = tokens if self.spec.depth > 1 else tokens[..., None]
        ids = ids.masked_fill(masked[..., None], self.spec.size).flatten(1)
        prefix = self.conditioner(condition, dropped).expand(-1, self.spec.depth, -1)
        x = self.dropout(torch.cat([prefix, self.embedding(ids)], dim=1))
        hidden = self.stack(x, self.rotary, sight=Sight())[0][:, self.spec.depth:]
        # As officially the table has no gradient from here; the mask is never predicted.
        logits = self.transform(hidden) @ self.embedding.weight.detach().T + self.bias
        logits = logits[..., :-1].float()
        return logits if self.spec.depth == 1 else logits.unflatten(1, (-1, self.spec.depth))

    def masked_loss(self, tokens: Tensor, logits: Tensor, masked: Tensor) -> Tensor:
        """Label-smoothed cross-entropy `[B]`, the mean over the ids of masked positions."""
        losses = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none",
                                 label_smoothing=self.smoothing).view(*masked.shape, -1).mean(dim=-1)
        return (losses * masked).sum(dim=1) / masked.sum(dim=1).clamp(min=1)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """The loss at masked positions; their share is one draw for the batch."""
        self.check_condition(batch.condition)
        step = draws.shared.integers("mask_step", self.mask_steps).item()
        count = max(1, math.floor(self.spec.length * math.cos(math.pi / 2 * step / self.mask_steps)))
        masked = draws.permutation("order", self.spec.length).argsort(dim=1) < count
        dropped = draws.uniform("drop_condition") < self.conditioner.drop
        logits = self.logits(batch.tokens, masked, batch.condition, dropped)
        return weigh({"cross_entropy": self.masked_loss(batch.tokens, logits, masked)}, batch.weights)

    def check_plan(self, plan: Any) -> None:
        require_plan(plan, ConfidencePlan, "MaskedELM", self.spec.length)

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> MaskedELMDecoding:
        self.check_condition(condition)
        return MaskedELMDecoding(self, condition, draws, of_phase(guidance),
                                 require_plan(plan, ConfidencePlan, "MaskedELM", self.spec.length))

    def key_maps(self) -> dict[str, KeyMap]:
        """Official files also hold weights that nothing uses: `proj`, `pos_embed` and `output`."""
        return {"elm": KeyMap([
            Rename("tok_embedder.weight", "embedding.weight"), *LLAMA_RULES, Rename("norm.weight", "stack.norm.weight"),
            Rename("mlm_layer.bias", "bias", convert=lambda bias: bias.flatten(),
                   revert=lambda bias: bias[None, None]),
            Rename("mlm_layer.fc.{p}", "transform.0.{p}"), Rename("mlm_layer.ln.{p}", "transform.2.{p}"),
            Ignore("proj.weight"), Ignore("pos_embed.weight"), Ignore("output.{i}.weight")])}


class MaskedELMDecoding(Decoding):
    """Every step draws all masked positions and masks those anew of which it is least sure (MaskGIT)."""

    def __init__(self, generator: MaskedELM, condition: Condition, draws: AnyDraws, guidance: Schedule | None,
                 plan: ConfidencePlan) -> None:
        spec, device = generator.spec, next(generator.parameters()).device
        self.generator, self.draws, self.guidance, self.plan = generator, draws, guidance, plan
        self._index, self._masked = 0, torch.ones(condition.size, spec.length, dtype=torch.bool, device=device)
        ids = (spec.length,) if spec.depth == 1 else (spec.length, spec.depth)
        self.tokens = torch.zeros(condition.size, *ids, dtype=torch.long, device=device)
        condition, scout = condition.to(device), [self._step(index) for index in range(plan.steps)]
        guided = needs_null_branch(guidance, scout)
        self._conditions = [condition, generator.conditioner.null(condition)] if guided else [condition]

    def _step(self, index: int) -> Step:
        positions = self._masked.nonzero()[:, 1].view(len(self._masked), -1)
        count, total = positions.shape[1], self.generator.spec.length
        left = self.plan.left(index, count, total) if index < self.plan.steps - 1 else 0
        return Step(index=index, of=self.plan.steps, positions=positions, drawn=total - count, left=left, total=total)

    @property
    def steps(self) -> Iterator[Step]:
        while self._index < self.plan.steps:
            yield self._step(self._index)

    def predict(self, step: Step) -> Categorical:
        masked = self._masked.scatter(1, step.positions, True)
        logits = torch.cat([self.generator.logits(self.tokens, masked, condition) for condition in self._conditions])
        if len(self._conditions) == 2:
            assert self.guidance is not None, "a null branch is there for guidance"
            logits = guide(logits, self.guidance(step))
        logits = take(logits, step.positions)
        return Categorical(logits=logits, positions=step.positions, redraw=step.index, carry=logits)

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        """Take the tokens and, of the positions drawn, mask the `step.left` of the least confidence anew.

        Args:
            carry: the logits from which the tokens were drawn.
        """
        at = step.positions.view(*step.positions.shape, *(1,) * (tokens.ndim - 2))
        self.tokens = self.tokens.scatter(1, at.expand_as(tokens), tokens)
        sureness = carry.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        noise = self.plan.noise * (1 - (step.index + 1) / step.of)
        if noise:
            sureness = sureness + noise * self.draws.gumbel("confidence", tuple(tokens.shape[2:]), at=step.positions,
                                                            redraw=step.index)
        order = sureness.flatten(2).mean(dim=2).argsort(dim=1) if tokens.ndim > 2 else sureness.argsort(dim=1)
        unsure = step.positions.gather(1, order[:, :step.left])
        self._masked = self._masked.scatter(1, step.positions, False).scatter(1, unsure, True)
        self._index = step.index + 1


def take(rows: Tensor, positions: Tensor) -> Tensor:
    """The rows `[B, n, ...]` of `[B, N, ...]` at positions `[B, n]`."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], positions]


def require_grid(spec: TokenSpec) -> None:
    """Raise ValueError unless the spec is a discrete grid."""
    if spec.kind != "discrete" or spec.layout != "grid":
        raise ValueError(f"ELM models discrete grids, got {spec}.")
