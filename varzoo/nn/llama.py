"""The LLaMA-style decoder stack that the causal generators share (LlamaGen, NAR, D-AR, Token-Shuffle).

Pre-norm blocks of rotary attention and SwiGLU, RMSNorm, no biases (arXiv 2302.13971). Positions come as rotary rows and
cache slots, visibility as a mask: the stack knows neither order nor grid.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.nn.kv_cache import KVCache
from varzoo.nn.rotary import rotate


def swiglu_width(width: int, multiple_of: int = 256) -> int:
    """Hidden width of SwiGLU: 8/3 of the model's, rounded up to a multiple."""
    return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


class Attention(nn.Module):
    """Multi-head attention with rotary positions; one fused projection whose rows are q, k, v."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads.")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int,
                slots: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (tensor.transpose(1, 2) for tensor in (rotate(q, rows), rotate(k, rows), v))
        if cache is not None:
            k, v = cache.update(layer, slots, k, v)
        causal = mask is None and q.shape[2] > 1
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, *, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, *, width: int, heads: int, hidden: int, norm_eps: float, attention_dropout: float,
                 mlp_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = Attention(width=width, heads=heads, dropout=attention_dropout)
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = SwiGLU(width=width, hidden=hidden, dropout=mlp_dropout)

    def forward(self, x: Tensor, rows: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int,
                slots: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rows, mask, cache, layer, slots)
        return x + self.mlp(self.mlp_norm(x))


class LlamaStack(nn.Module):
    """Blocks and the final norm.

    Args:
        width, depth, heads: sizes of the stack.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    def __init__(self, *, width: int, depth: int, heads: int, multiple_of: int = 256, norm_eps: float = 1e-5,
                 attention_dropout: float = 0.0, mlp_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, hidden=swiglu_width(width, multiple_of), norm_eps=norm_eps,
                  attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
            for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, cache: KVCache | None = None,
                slots: Tensor | None = None) -> Tensor:
        """Hidden states of the tokens fed.

        Args:
            x: embeddings `[B, n, width]`.
            rows: rotary rows `[n, head_dim / 2, 2]`, or `[B, n, head_dim / 2, 2]`.
            mask: boolean, broadcastable to `[B, heads, n, keys]`, True where attended; None means that a single
                token sees every key and several see causally.
            cache: where keys and values are kept, at `slots` `[n]`; the keys are then all slots within its reach.

        Returns:
            `[B, n, width]`, normed.
        """
        for layer, block in enumerate(self.blocks):
            x = block(x, rows, mask, cache, layer, slots)
        return self.norm(x)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache in the stack's dtype and on its device."""
        weight = self.norm.weight
        return KVCache(layers=len(self.blocks), batch=batch, heads=self.heads, slots=slots, head_dim=self.head_dim,
                       dtype=weight.dtype, device=weight.device)
