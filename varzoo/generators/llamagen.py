"""LlamaGen (arXiv 2406.06525): a plain LLaMA decoder over raster-ordered VQ codes, class- or text-conditional.

As in the official code, and unlike a textbook decoder:
- prefix tokens have rotary rows of zeros, so their queries and keys vanish: every token attends to them with the
  weight of a zero logit, and they attend uniformly;
- a text prefix keeps its caption's padding mask in the null branch of guidance too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import CausalGenerator, Order
from varzoo.generators.conditioners import Conditioner
from varzoo.nn.llama import LlamaStack
from varzoo.nn.rotary import axial_table, zero_rows


class LlamaGen(CausalGenerator):
    """Next-token prediction in raster order with axial rotary positions.

    Args:
        spec: discrete grid; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        width, depth, heads: of the decoder.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, depth: int, heads: int,
                 multiple_of: int = 256, norm_eps: float = 1e-5, token_dropout: float = 0.1,
                 attention_dropout: float = 0.1, mlp_dropout: float = 0.1) -> None:
        super().__init__()
        if spec.kind != "discrete" or spec.depth != 1 or spec.layout != "grid":
            raise ValueError(f"LlamaGen models discrete grids of depth 1, got {spec}.")
        self.spec, self.conditioner = spec, conditioner
        self.embedding = nn.Embedding(spec.size, width)
        self.dropout = nn.Dropout(token_dropout)
        self.stack = LlamaStack(width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
                                attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.head = nn.Linear(width, spec.size, bias=False)
        self.order = Order.raster(conditioner.length, spec.length)
        head_dim = width // heads
        rows = torch.cat([zero_rows(conditioner.length, head_dim), axial_table(spec.shape, head_dim)])
        self.register_buffer("rotary", rows, persistent=False)
        self.apply(self._initialise)
        nn.init.zeros_(self.head.weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def step_logits(self, hidden: Tensor, step: Step) -> Tensor:
        return self.head(hidden[:, -1:])

    def hidden(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        return super().hidden(tokens, condition, dropped)

    def forward(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `[B, T + m, V]` for the first m tokens `[B, m]`; row T - 1 + i predicts token i."""
        return self.head(self.hidden(tokens, condition, dropped)).float()

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Mean cross-entropy over all tokens, in nats; samples are weighted by `batch.weights`."""
        self.check_condition(batch.condition)
        dropped = draws.uniform("drop_condition") < self.conditioner.drop
        logits = self.forward(batch.tokens[:, :-1], batch.condition, dropped)[:, self.conditioner.length - 1:]
        per_sample = F.cross_entropy(logits.transpose(1, 2), batch.tokens, reduction="none").mean(dim=1)
        weights = torch.ones_like(per_sample) if batch.weights is None else batch.weights.to(per_sample.dtype)
        total = (per_sample * weights).sum() / weights.sum().clamp(min=1e-9)
        return Losses(total, {"cross_entropy": total.detach()})

    def key_maps(self) -> dict[str, KeyMap]:
        return {"llamagen": KeyMap([
            Rename("cls_embedding.embedding_table.weight", "conditioner.table.weight"),
            Rename("cls_embedding.cap_proj.fc1.weight", "conditioner.projection.0.weight"),
            Rename("cls_embedding.cap_proj.fc2.weight", "conditioner.projection.2.weight"),
            Rename("cls_embedding.uncond_embedding", "conditioner.null_features"),
            Rename("tok_embeddings.weight", "embedding.weight"),
            Rename("layers.{i}.attention.wqkv.weight", "stack.blocks.{i}.attention.qkv.weight"),
            Rename("layers.{i}.attention.wo.weight", "stack.blocks.{i}.attention.out.weight"),
            Rename("layers.{i}.feed_forward.w1.weight", "stack.blocks.{i}.mlp.gate.weight"),
            Rename("layers.{i}.feed_forward.w3.weight", "stack.blocks.{i}.mlp.up.weight"),
            Rename("layers.{i}.feed_forward.w2.weight", "stack.blocks.{i}.mlp.down.weight"),
            Rename("layers.{i}.attention_norm.weight", "stack.blocks.{i}.attention_norm.weight"),
            Rename("layers.{i}.ffn_norm.weight", "stack.blocks.{i}.mlp_norm.weight"),
            Rename("norm.weight", "stack.norm.weight"),
            Rename("output.weight", "head.weight"),
            Ignore("freqs_cis"),  # older files carry the rotary table
        ])}
