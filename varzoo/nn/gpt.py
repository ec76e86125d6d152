"""A GPT-style stack with biases: pre-norm blocks of causal attention and a GELU MLP (RQ-Transformer's body and head).

Positions are the caller's business (learned tables are added to the embeddings), visibility is a `Sight`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.keymap import Concat, Rename, Rule
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Sight


class GPTAttention(nn.Module):
    """Multi-head attention; one fused projection whose rows are q, k, v."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads.")
        self.heads = heads
        self.qkv = FewRowsLinear(width, 3 * width)
        self.out = FewRowsLinear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sight: Sight, cache: KVCache | None, layer: int, slots: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            assert slots is not None, "a cache is written at slots"
            k, v = cache.update(layer, slots, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, is_causal=sight.causal)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP four times as wide inside."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = GPTAttention(width=width, heads=heads, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(FewRowsLinear(width, 4 * width), nn.GELU(), FewRowsLinear(4 * width, width),
                                 nn.Dropout(dropout))

    def forward(self, x: Tensor, sight: Sight, cache: KVCache | None, layer: int, slots: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sight, cache, layer, slots)
        return x + self.mlp(self.mlp_norm(x))


class GPTStack(nn.Module):
    """Blocks without a norm at the end.

    Args:
        width, depth, heads: sizes of the stack.
        dropout: on the outputs of attention and MLP.
    """

    def __init__(self, *, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a stack needs at least 1 block, got {depth}.")
        self.blocks = nn.ModuleList(GPTBlock(width=width, heads=heads, dropout=dropout) for _ in range(depth))
        self.heads, self.head_dim = heads, width // heads

    def forward(self, x: Tensor, *, sight: Sight, cache: KVCache | None = None, slots: Tensor | None = None) -> Tensor:
        """Embeddings `[B, n, width]`, positions included -> hidden states; see `LlamaStack` for the rest."""
        for layer, block in enumerate(self.blocks):
            x = block(x, sight, cache, layer, slots)
        return x

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache in the stack's dtype and on its device."""
        first: Any = self.blocks[0]
        weight = first.attention.out.weight
        return KVCache(layers=len(self.blocks), batch=batch, heads=self.heads, slots=slots, head_dim=self.head_dim,
                       dtype=weight.dtype, device=weight.device)


def gpt_rules(official: str, ours: str) -> list[Rule]:
    """Names of a stack in RQ-Transformer's files, whose q, k and v are three layers."""
    theirs, mine = f"{official}.blocks.{{i}}", f"{ours}.blocks.{{i}}"
    names = {"ln1": "attention_norm", "ln2": "mlp_norm", "attn.proj": "attention.out", "mlp.0": "mlp.0",
             "mlp.2": "mlp.2"}
    return [*(Concat([f"{theirs}.attn.{part}.{kind}" for part in ("query", "key", "value")],
                     f"{mine}.attention.qkv.{kind}") for kind in ("weight", "bias")),
            *(Rename(f"{theirs}.{name}.{{p}}", f"{mine}.{own}.{{p}}") for name, own in names.items())]
