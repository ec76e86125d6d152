"""Causal generators on the LLaMA stack, and the names in LlamaGen's checkpoints that those built on its code share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varzoo.core.keymap import Ignore, Rename
from varzoo.core.spec import TokenSpec
from varzoo.generators.causal import CausalGenerator
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.orders import Order
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import LlamaStack, Sight


class LlamaGenerator(CausalGenerator):
    """Base of those whose backbone is the LLaMA stack (LlamaGen, D-AR, NAR), which rotary rows tell where it is.

    Args:
        spec: discrete tokens of depth 1; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        order: of the cells after them.
        rows: rotary rows `[T + N, head_dim / 2, 2]` of the prefix tokens and of the positions in raster order.
        width, depth, heads: of the stack.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    rotary: Tensor
    slots: Tensor

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, order: Order, rows: Tensor, width: int,
                 depth: int, heads: int, multiple_of: int, norm_eps: float, token_dropout: float,
                 attention_dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        self.spec, self.conditioner, self.order, self.width = spec, conditioner, order, width
        self.embedding = nn.Embedding(spec.size, width)
        self.dropout = nn.Dropout(token_dropout)
        self.stack = LlamaStack(width=width, depth=depth, heads=heads, exits=len(order.sources),
                                multiple_of=multiple_of, norm_eps=norm_eps, attention_dropout=attention_dropout,
                                mlp_dropout=mlp_dropout)
        prefix, grid = rows.split([order.prefix, len(order.cells)])
        self.register_buffer("rotary", torch.cat([prefix, grid[order.cells.to(grid.device)]]), persistent=False)
        self.register_buffer("slots", torch.arange(len(rows)), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]  # follows from its parts
        """"verify" and, where a cell is one id, "features": a drafter may predict the hidden states of the stack."""
        offers, single = super().offers, self.spec.depth == 1
        return offers | {"features"} if offers and single else offers

    def rows(self, places: slice | Tensor) -> Tensor:
        """Rotary rows of places; those past the last cell are zeros, as LANTERN has them."""
        if isinstance(places, slice):
            return self.rotary[places]
        last = len(self.rotary) - 1
        return self.rotary[places.clamp(max=last)] * (places <= last)[..., None, None]

    def run(self, x: Tensor, places: slice | Tensor, *, sight: Sight, cache: KVCache | None = None,
            slots: Tensor | None = None) -> list[Tensor]:
        slots = self.slots[places] if slots is None else slots
        return self.stack(self.dropout(x), self.rows(places), sight=sight, cache=cache, slots=slots)

    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        return self.stack.new_cache(batch, len(self.rotary) + spare)


LLAMA_RULES = (  # LlamaGen's names, in everything built on its code
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
    Ignore("freqs_cis"),  # older files carry the rotary table
)
