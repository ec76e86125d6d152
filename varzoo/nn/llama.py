"""The LLaMA-style decoder stack that the causal generators share (LlamaGen, NAR, D-AR, Token-Shuffle).

Pre-norm blocks of rotary attention and SwiGLU, RMSNorm, no biases (arXiv 2302.13971). Positions come as rotary rows and
cache slots, visibility as a `Sight`: the stack knows neither order nor grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.keymap import Concat, Rename, Rule
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.rotary import rotate


def swiglu_width(width: int, multiple_of: int = 256) -> int:
    """Hidden width of SwiGLU: 8/3 of the model's, rounded up to a multiple."""
    return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which keys the tokens fed attend to: all of them, unless told otherwise.

    Args:
        mask: boolean, broadcastable to `[B, heads, n, keys]`, True where attended.
        causal: instead of a mask: the i-th token sees the first i + 1 keys.
    """

    mask: Tensor | None = None
    causal: bool = False


class Attention(nn.Module):
    """Multi-head attention with rotary positions; one fused projection whose rows are q, k, v."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads.")
        self.heads = heads
        self.qkv = FewRowsLinear(width, 3 * width, bias=False)
        self.out = FewRowsLinear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: Tensor, sight: Sight, cache: KVCache | None, layer: int,
                slots: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))
        qk, v = qkv.split((2 * self.heads, self.heads), dim=2)
        q, k = rotate(qk, rows).chunk(2, dim=2)  # turned together: half as many small operations
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if cache is not None:
            assert slots is not None, "a cache is written at slots"
            k, v = cache.update(layer, slots, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, is_causal=sight.causal)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, *, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = FewRowsLinear(width, hidden, bias=False)
        self.up = FewRowsLinear(width, hidden, bias=False)
        self.down = FewRowsLinear(hidden, width, bias=False)
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

    def forward(self, x: Tensor, rows: Tensor, sight: Sight, cache: KVCache | None, layer: int,
                slots: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rows, sight, cache, layer, slots)
        return x + self.mlp(self.mlp_norm(x))


class LlamaStack(nn.Module):
    """Blocks, and a norm at every exit.

    Args:
        width, depth, heads: sizes of the stack.
        exits: hidden states leave after each of the last `exits` blocks, each through a norm of its own.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    def __init__(self, *, width: int, depth: int, heads: int, exits: int = 1, multiple_of: int = 256,
                 norm_eps: float = 1e-5, attention_dropout: float = 0.0, mlp_dropout: float = 0.0) -> None:
        super().__init__()
        if not 1 <= exits <= depth:
            raise ValueError(f"a stack of {depth} blocks has between 1 and {depth} exits, got {exits}.")
        self.heads, self.head_dim = heads, width // heads
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, hidden=swiglu_width(width, multiple_of), norm_eps=norm_eps,
                  attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
            for _ in range(depth))
        self.early_norms = nn.ModuleList(nn.RMSNorm(width, eps=norm_eps) for _ in range(exits - 1))
        self.norm = nn.RMSNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, rows: Tensor, *, sight: Sight, cache: KVCache | None = None,
                slots: Tensor | None = None) -> list[Tensor]:
        """Hidden states of the tokens fed.

        Args:
            x: embeddings `[B, n, width]`.
            rows: rotary rows `[n, head_dim / 2, 2]`, or `[B, n, head_dim / 2, 2]`.
            sight: what the tokens attend to.
            cache: where keys and values are kept, at `slots` `[n]`; the keys are then all slots within its reach.

        Returns:
            `[B, n, width]`, normed, from every exit, the earliest first.
        """
        norms = [*self.early_norms, self.norm]
        hidden: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x = block(x, rows, sight, cache, layer, slots)
            if layer >= len(self.blocks) - len(norms):
                hidden.append(norms[len(hidden)](x))
        return hidden

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache in the stack's dtype and on its device."""
        weight = self.norm.weight
        return KVCache(layers=len(self.blocks), batch=batch, heads=self.heads, slots=slots, head_dim=self.head_dim,
                       dtype=weight.dtype, device=weight.device)


def huggingface_rules(official: str, ours: str) -> list[Rule]:
    """Names of a layer in Hugging Face's layout of Llama, whose q, k and v are three; both may have placeholders."""
    names = {"self_attn.o_proj": "attention.out", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
             "mlp.down_proj": "mlp.down", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return [Concat([f"{official}.self_attn.{part}_proj.weight" for part in "qkv"], f"{ours}.attention.qkv.weight"),
            *(Rename(f"{official}.{theirs}.weight", f"{ours}.{mine}.weight") for theirs, mine in names.items())]
