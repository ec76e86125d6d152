"""RQ-Transformer (arXiv 2203.01941, section 3.2): a body over positions, a small head over the codes of each.

Official code: kakaobrain/rq-vae-transformer. The body is causal over conditions and positions, in raster order, and
gives a context per position; the head starts at the context and predicts the D codes of the position one after the
other. There is no classifier-free guidance. As in the official code:
- codes come in as the tokenizer's code vectors; the affine map in front of the body acts on every level's vector, bias
  included, and then they are summed, while the head sees the sums of the vectors so far;
- the head is not told where on the grid it is; neither transformer ends in a norm, the classifiers begin with one.

The training of this stage was not released; the loss follows the paper's section 3.2.3 (docs/rqvae.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.losses import Losses, weigh
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import CausalGenerator, cross_entropy
from varzoo.generators.conditioners import CaptionPrefix, Conditioner
from varzoo.generators.orders import Order, Turn
from varzoo.nn.code_tables import code_tables, look_up, require_tables
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.gpt import GPTStack, gpt_rules
from varzoo.nn.initial import normal_weight
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Sight
from varzoo.predictions.base import Prediction
from varzoo.predictions.depth import DepthPrediction


class LevelLinear(nn.Module):
    """A linear layer for every level: `[..., d, inputs]` -> `[..., d, outputs]`."""

    def __init__(self, levels: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(levels, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(levels, outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, levels: slice) -> Tensor:
        return torch.einsum("...di,dio->...do", x, self.weight[levels]) + self.bias[levels]


class RQTransformer(CausalGenerator):
    """A body transformer over positions and a head transformer over levels.

    Args:
        spec: discrete tokens of depth D > 1; `size` is the codebook's.
        conditioner: what the prefix tokens are. Captions are modelled too: their next tokens are a part of the loss.
        width: of both transformers.
        body_depth, body_heads, head_depth, head_heads: their sizes.
        code_channels: channels of the tokenizer's code vectors, which embed the codes; None: learned tables do.
        shared_table: of learned tables: one for all levels.
        cumulative: whether the head sees the sum of the vectors so far, or the last alone.
        shared_classifier: one classifier for all levels.
        dropout: on the outputs of attention and MLP.
    """

    goldens: ClassVar[tuple[str, ...]] = ("rqvae/transformer_*",)
    codebook: Tensor | None
    slots: Tensor

    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": DepthPrediction}

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, body_depth: int, body_heads: int,
                 head_depth: int, head_heads: int, code_channels: int | None, shared_table: bool, cumulative: bool,
                 shared_classifier: bool, dropout: float) -> None:
        super().__init__()
        if spec.kind != "discrete" or spec.depth == 1:
            raise ValueError(f"RQ-Transformer models discrete tokens of a depth above 1, got {spec}.")
        self.spec, self.conditioner, self.width, self.levels = spec, conditioner, width, spec.depth
        self.order = Order.raster(conditioner.length, spec.length)
        self.code_channels, self.shared_table, self.cumulative = code_channels, shared_table, cumulative
        if code_channels is None:
            self.token_table = nn.Embedding(spec.size * (1 if shared_table else spec.depth), width)
            self.input_map: nn.Module = nn.Identity()
            self.head_map: nn.Module = nn.Identity()
        else:
            self.input_map, self.head_map = nn.Linear(code_channels, width), nn.Linear(code_channels, width)
        self.register_buffer("codebook", None, persistent=False)  # the tokenizer's, when they are composed
        self.prefix_positions = nn.Parameter(torch.empty(1, conditioner.length, width))
        self.cell_positions = nn.Parameter(torch.empty(1, spec.length, width))
        self.level_positions = nn.Parameter(torch.empty(1, spec.depth, width))
        self.body = GPTStack(width=width, depth=body_depth, heads=body_heads, dropout=dropout)
        self.head = GPTStack(width=width, depth=head_depth, heads=head_heads, dropout=dropout)
        self.classifier_norm = nn.LayerNorm(width)
        self.classifier = (FewRowsLinear(width, spec.size) if shared_classifier
                           else LevelLinear(spec.depth, width, spec.size))
        if isinstance(conditioner, CaptionPrefix):
            self.caption_norm = nn.LayerNorm(width)
            self.caption_classifier = nn.Linear(width, conditioner.table.num_embeddings)
        self.register_buffer("slots", torch.arange(conditioner.length + spec.length), persistent=False)
        self.apply(normal_weight)
        for positions in (self.prefix_positions, self.cell_positions, self.level_positions):
            nn.init.normal_(positions, std=0.02)

    @property
    def embeds_codebook(self) -> bool:  # type: ignore[override]  # follows from its parts
        return self.code_channels is not None

    def use_codebook(self, codebook: Tensor) -> None:
        if self.code_channels is None:
            super().use_codebook(codebook)  # refuses it
            return
        tables = code_tables(codebook, size=self.spec.size, channels=self.code_channels, levels=self.levels)
        self.codebook = tables.to(self.level_positions.device)

    def code_vectors(self, ids: Tensor) -> Tensor:
        """Ids `[..., d]` of the first d levels -> vectors `[..., d, C]` of the codebook or of the learned tables."""
        if self.code_channels is None:
            return look_up(self.token_table.weight.unflatten(0, (-1, self.spec.size)), ids)
        return look_up(require_tables(self.codebook).to(self.level_positions.dtype), ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids `[B, m, D]` -> embeddings `[B, m, width]`, positions not included."""
        return self.input_map(self.code_vectors(ids)).sum(dim=-2)

    def run(self, x: Tensor, places: slice | Tensor, *, sight: Sight, cache: KVCache | None = None,
            slots: Tensor | None = None) -> list[Tensor]:
        positions = torch.cat([self.prefix_positions, self.cell_positions], dim=1)[0]
        slots = self.slots[places] if slots is None else slots
        return [self.body(x + positions[places], sight=sight, cache=cache, slots=slots)]

    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        return self.body.new_cache(batch, len(self.slots) + spare)

    def prediction(self, features: Sequence[Tensor], turn: Turn, positions: Tensor) -> DepthPrediction:
        return DepthPrediction(context=features[0], positions=positions, network=self)

    def new_level_cache(self, batch: int) -> KVCache:
        return self.head.new_cache(batch, self.levels)

    def next_logits(self, context: Tensor, ids: Tensor, cache: KVCache) -> Tensor:
        level = ids.shape[-1]
        x = self._head_inputs(context, ids)[..., level:, :].flatten(0, 1)
        cache.reach = level + 1
        hidden = self.head(x, sight=Sight(), cache=cache, slots=torch.tensor([level], device=x.device))
        return self._classify(hidden, slice(level, level + 1)).view(*context.shape[:2], -1)

    def level_logits(self, context: Tensor, ids: Tensor) -> Tensor:
        """Teacher-forced logits `[B, n, D, V]`, float32, of contexts `[B, n, width]` and ids `[B, n, D]`."""
        x = self._head_inputs(context, ids[..., :-1])
        hidden = self.head(x.flatten(0, 1), sight=Sight(causal=True))
        return self._classify(hidden, slice(None)).unflatten(0, context.shape[:2])

    def logits(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `[B, N, D, V]`, float32, given all tokens `[B, N, D]`."""
        return self.level_logits(self._contexts(tokens, condition, dropped)[0], tokens)

    def caption_logits(self, states: Tensor) -> Tensor:
        """Hidden states of the body `[B, T + m, width]` -> logits `[B, T - 1, V]` of the captions' next tokens."""
        return self.caption_classifier(self.caption_norm(states[:, :self.conditioner.length - 1])).float()

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Cross-entropy over all codes, against soft targets where the batch has them, and over captions' next tokens.

        Either is a mean over ids, in nats; samples are weighted by `batch.weights`.
        """
        self.check_condition(batch.condition)
        dropped = draws.uniform("drop_condition") < self.conditioner.drop
        contexts, states = self._contexts(batch.tokens, batch.condition, dropped)
        logits, soft = self.level_logits(contexts, batch.tokens), batch.extras.get("soft_targets")
        parts = {"cross_entropy": cross_entropy(logits, batch.tokens) if soft is None
                 else -(soft * logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=(1, 2))}
        if batch.condition.ids is not None:
            parts["caption"] = cross_entropy(self.caption_logits(states), batch.condition.ids[:, 1:])
        return weigh(parts, batch.weights)

    def key_maps(self) -> dict[str, KeyMap]:
        """The official layout "rqvae", without the tokenizer that files may hold beside it."""
        names = {
            "pos_emb_cond": "prefix_positions", "pos_emb_hw": "cell_positions", "pos_emb_d": "level_positions",
            "cond_emb.weight": "conditioner.table.weight", "tok_emb.weight": "token_table.weight",
            "input_mlp.{p}": "input_map.{p}", "head_mlp.{p}": "head_map.{p}",
            "classifier.layer_norm.{p}": "classifier_norm.{p}", "classifier.linear.{p}": "classifier.{p}",
            "cond_classifier.layer_norm.{p}": "caption_norm.{p}",
            "cond_classifier.linear.{p}": "caption_classifier.{p}",
        }
        offsets = None
        if self.code_channels is None and not self.shared_table:
            offsets = lambda: self.spec.size * torch.arange(self.levels)  # noqa: E731
        return {"rqvae": KeyMap([*(Rename(theirs, ours) for theirs, ours in names.items()),
                                 *gpt_rules("body_transformer", "body"), *gpt_rules("head_transformer", "head"),
                                 Ignore("tok_emb.offsets", constant=offsets)])}

    def _contexts(self, tokens: Tensor, condition: Condition, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """Contexts `[B, N, width]`, and the body's hidden states `[B, T + N - 1, width]`."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.spec.length, self.levels):
            raise ValueError(f"expected ids [B, {self.spec.length}, {self.levels}] for {self.spec}, got "
                             f"{list(tokens.shape)}.")
        turn = self.order.everything.to(tokens.device)
        hidden = self.hidden(tokens[:, turn.ids], condition, dropped)
        return self.read(hidden, turn)[0], hidden[0]

    def _head_inputs(self, context: Tensor, ids: Tensor) -> Tensor:
        """Contexts `[B, n, width]` and ids `[B, n, d]` -> inputs of the head's first d + 1 levels."""
        vectors = self.code_vectors(ids)
        codes = self.head_map(vectors.cumsum(dim=-2) if self.cumulative else vectors)
        return torch.cat([context[..., None, :], codes], dim=-2) + self.level_positions[0, :ids.shape[-1] + 1]

    def _classify(self, hidden: Tensor, levels: slice) -> Tensor:
        hidden = self.classifier_norm(hidden)
        if isinstance(self.classifier, LevelLinear):
            return self.classifier(hidden, levels).float()
        return self.classifier(hidden).float()
