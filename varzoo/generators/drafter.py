"""EAGLE-style drafter (arXiv 2401.15077), as LANTERN trains it (arXiv 2410.03355; official code: jadohu/LANTERN).

One layer of a LLaMA that predicts the target's next hidden state from the hidden state at a place and the token that
follows it; the target's own head turns the prediction into logits. It draws nothing by itself: samplers draft with it,
and its target verifies.

As in the official code, unlike a textbook layer or paper:
- the first layer has no norm before attention, and there is none after the last;
- tokens that stand at the places of a prefix are id 0;
- padding of captions is not hidden from it;
- noise on the features is scaled by 512 over the length of the sequence (512 / S, meant to be the width).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.losses import Losses, weighted_mean
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule
from varzoo.generators.base import Batch, Condition, Generator
from varzoo.generators.llama import LlamaGenerator
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Block, Sight, huggingface_rules
from varzoo.predictions.base import Prediction
from varzoo.predictions.categorical import Categorical

TABLES = ("embedding", "head")


class Drafter(Generator):
    """Predicts hidden states of a target.

    Args:
        spec: the target's.
        width, heads: the target's width, heads of attention.
        depth: layers.
        hidden: inner width of the MLPs.
        norm_eps: epsilon of every RMSNorm.
        bias: whether the layer that joins token and feature has one.
        table: which of the target's tables embeds tokens, frozen, when training begins: its "embedding", or, as the
            official code falls back to for LlamaGen, its "head".
        noise: amplitude of the uniform noise on features in training, before the factor 512 / S.
        logits_weight: of the cross-entropy between the target's and the drafter's distributions in the loss.
        drop: probability of the null condition in training.
    """

    goldens: ClassVar[tuple[str, ...]] = ("lantern/draft*",)
    needs_target = True
    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": Categorical}

    def __init__(self, *, spec: TokenSpec, width: int, depth: int, heads: int, hidden: int, norm_eps: float, bias: bool,
                 table: str, noise: float, logits_weight: float, drop: float) -> None:
        super().__init__()
        if table not in TABLES:
            raise unknown("table", table, TABLES)
        if depth < 1:
            raise ValueError(f"a drafter has at least 1 layer, got depth={depth}.")
        self.spec, self.width, self.table = spec, width, table
        self.noise, self.logits_weight, self.drop = noise, logits_weight, drop
        self.embedding = nn.Embedding(spec.size, width).requires_grad_(False)
        self.fuse = FewRowsLinear(2 * width, width, bias=bias)
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, hidden=hidden, norm_eps=norm_eps,
                                          attention_dropout=0.0, mlp_dropout=0.0) for _ in range(depth))
        self.blocks[0].attention_norm = nn.Identity()
        self.heads = heads
        self._target: Lent | None = None

    num_classes = None  # its target's business

    @property
    def target(self) -> LlamaGenerator:
        """The generator whose hidden states it learns. Raises ValueError if it was given none."""
        if self._target is None:
            raise ValueError("a drafter learns the hidden states of a target and was given none: name its run, as in "
                             "target_checkpoint=runs/digits_llamagen.")
        assert isinstance(self._target.generator, LlamaGenerator)  # as `require_fit` saw
        return self._target.generator

    def use_target(self, target: Generator) -> None:
        """Learn from a generator, which is frozen and no part of this one; embed tokens by one of its tables."""
        self.require_fit(target)
        self._target = Lent(target.eval().requires_grad_(False))
        source: Any = target.embedding if self.table == "embedding" else target.head
        self.embedding.weight.data.copy_(source.weight)

    def require_fit(self, target: Generator) -> None:
        """Raise ValueError unless this can draft for a target."""
        if "features" not in target.offers:
            raise ValueError(f"{type(target).__name__} offers no hidden states that a drafter could predict, since "
                             f"{target.lacks('features')}. Draft by a smaller generator (sampler=speculative), or by "
                             "none (sampler=sjd).")
        if target.spec != self.spec:
            raise ValueError(f"this drafter was made for {self.spec}, the target models {target.spec}: choose the "
                             "drafter that was trained with it (drafter=...).")
        if target.width != self.width:
            raise ValueError(f"this drafter predicts features of width {self.width}, the target's have width "
                             f"{target.width}: choose the drafter that was trained with it (drafter=...).")

    def forward(self, features: Tensor, ids: Tensor, rows: Tensor, *, sight: Sight, cache: KVCache | None = None,
                slots: Tensor | None = None) -> Tensor:
        """Predicted hidden states `[B, n, width]`, not normed.

        Args:
            features: `[B, n, width]` hidden states at some places.
            ids: `[B, n]` the token after each.
            rows: rotary rows `[(B,) n, head_dim / 2, 2]` of those tokens' places.
            sight, cache, slots: see `LlamaStack`.
        """
        x = self.fuse(torch.cat([self.embedding(ids).to(features.dtype), features], dim=-1))
        for layer, block in enumerate(self.blocks):
            x = block(x, rows, sight, cache, layer, slots)
        return x

    def new_cache(self, batch: int, slots: int) -> KVCache:
        weight = self.fuse.weight
        return KVCache(layers=len(self.blocks), batch=batch, heads=self.heads, slots=slots,
                       head_dim=self.width // self.heads, dtype=weight.dtype, device=weight.device)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """The distance to the target's next hidden states, and of its distributions, at the cells but the last."""
        target = self.target.to(batch.tokens.device)
        target.check_condition(batch.condition)
        prefix, order = target.order.prefix, target.order.positions.flatten().to(batch.tokens.device)
        tokens = batch.tokens[:, order]
        dropped = draws.uniform("drop_condition") < self.drop
        with torch.no_grad():
            features = target.hidden(tokens, batch.condition, dropped)[0]
        length = features.shape[1]
        noise = draws.uniform("feature_noise", tuple(features.shape[1:])) - 0.5
        noisy = features + (noise * self.noise * 512 / length).to(features.dtype)
        ids = F.pad(tokens, (prefix - 1, 1))
        rows = target.rows(torch.arange(1, length + 1, device=tokens.device))
        predicted = self(noisy, ids, rows, sight=Sight(causal=True))
        following = F.pad(features[:, 1:], (0, 0, 0, 1))
        learned = torch.zeros(length, device=tokens.device)
        learned[prefix:-1] = 1
        return self.losses(predicted, following, lambda states: target.project(0, states),
                           learned.expand(len(tokens), -1), batch.weights)

    def losses(self, predicted: Tensor, following: Tensor, head: Any, learned: Tensor,
               weights: Tensor | None = None) -> Losses:
        """Smooth L1 of the hidden states plus `logits_weight` times the cross-entropy of the two distributions.

        Args:
            predicted, following: `[B, S, width]` what was predicted, and what the target has.
            head: hidden states -> logits.
            learned: `[B, S]` 1 at places that count.
            weights: `[B]` of the samples.
        """
        distance = F.smooth_l1_loss(predicted.float(), following.float(), reduction="none").mean(dim=-1)
        truth, guess = head(following).float().softmax(dim=-1), head(predicted).float().log_softmax(dim=-1)
        entropy = -(truth * guess).sum(dim=-1)
        count = learned.sum() + 1e-5
        scale = len(learned) / count  # a mean over samples, of sums over places
        parts = {"feature": weighted_mean((distance * learned).sum(dim=1) * scale, weights),
                 "logits": weighted_mean((entropy * learned).sum(dim=1) * scale, weights)}
        total = parts["feature"] + self.logits_weight * parts["logits"]
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> NoReturn:
        """Raises ValueError: a drafter draws nothing by itself."""
        raise ValueError("a drafter draws nothing by itself: sample from its target, with sampler=lantern and this "
                         "run as drafter=...")

    def key_maps(self) -> dict[str, KeyMap]:
        return {"eagle": KeyMap([Rename("embed_tokens.weight", "embedding.weight"), Rename("fc.{p}", "fuse.{p}"),
                                 *huggingface_rules("layers.{i}", "blocks.{i}")])}


class Lent:
    """A generator that belongs to somebody else: copies of who borrowed it share it."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __deepcopy__(self, memo: dict[int, Any]) -> Lent:
        return self
