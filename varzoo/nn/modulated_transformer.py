"""The transformer that xAR and FlowAR share (arXiv 2502.20388, 2412.15205; their official code).

Two stacks of pre-norm blocks whose norms carry no weight and are scaled, shifted and gated by a condition (adaLN, arXiv
2212.09748), with two-dimensional rotary attention and GEGLU, and a learned position table before each stack. "Encoder"
and "decoder" are names only: every token passes through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import Tensor, nn

from varzoo.core.keymap import Ignore, Rename, Rule
from varzoo.nn.initial import xavier_linear
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.rotary import axial_rows, rotate

NORM_EPS = 1e-6


def time_index(times: Tensor) -> Tensor:
    """The whole timestep that stands for a time in [0, 1]: a product in float32, truncated, as officially."""
    return (times.float() * 1000).trunc()


def plain_norm(x: Tensor) -> Tensor:
    """RMSNorm without weight over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def geglu(width: int, mlp_ratio: float, dropout: float) -> SwiGLU:
    """fc2(gelu(fc1_g(x)) * fc1_x(x)) (arXiv 2002.05202), with two thirds of the hidden width that an MLP would have."""
    return SwiGLU(width, int(width * mlp_ratio * 2 / 3), act_layer=nn.GELU, drop=dropout)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; keys and values may be kept in a cache."""

    def __init__(self, *, width: int, heads: int, qkv_bias: bool, attention_dropout: float,
                 projection_dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads.")
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor, rows: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                layer: int = 0, slots: Tensor | None = None) -> Tensor:
        """x `[B, n, width]` at rotary rows `[n, head_dim / 2, 2]`; mask `[n, keys]` is True where attended."""
        qk, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), dim=2)
        q, k = rotate(qk, rows).chunk(2, dim=2)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if cache is not None:
            assert slots is not None, "a cache is written at slots"
            k, v = cache.update(layer, slots, k, v)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class ModulatedBlock(nn.Module):
    """x + gate attention(norm(x) (1 + scale) + shift), then the same with the MLP.

    A modulation `[..., 6 width]` is gates, scales and shifts, each of the attention first.
    """

    def __init__(self, *, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, attention_dropout: float,
                 projection_dropout: float) -> None:
        super().__init__()
        self.attn = Attention(width=width, heads=heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout,
                              projection_dropout=projection_dropout)
        self.mlp = geglu(width, mlp_ratio, projection_dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, modulation: Tensor, rows: Tensor, mask: Tensor | None = None,
                cache: KVCache | None = None, layer: int = 0, slots: Tensor | None = None) -> Tensor:
        """x `[B, n, width]`, modulation `[B, n or 1, 6 width]`; for the rest see `Attention`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(plain_norm(x) * (1 + scale1) + shift1, rows, mask, cache, layer, slots)
        return x + gate2 * self.mlp(plain_norm(x) * (1 + scale2) + shift2)


class ModulatedTransformer(nn.Module):
    """Embedded tokens at some slots of a sequence, and modulations -> hidden states.

    Args:
        channels: of the tokens that `token_embed` takes.
        coordinates: `[S, 2]` row and column of every slot of the sequence, as its rotary embedding sees them.
        width, heads: of both stacks.
        encoder_depth, decoder_depth: blocks of each stack.
        mlp_ratio: hidden width of an MLP over the width, of which GEGLU has two thirds.
        attention_dropout: on attention weights.
        projection_dropout: after attention projections and in the MLPs.
    """

    rotary: Tensor
    slots: Tensor

    def __init__(self, *, channels: int, coordinates: Tensor, width: int, heads: int, encoder_depth: int,
                 decoder_depth: int, mlp_ratio: float, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        length = len(coordinates)
        block = partial(ModulatedBlock, width=width, heads=heads, mlp_ratio=mlp_ratio, qkv_bias=True,
                        attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        norm = partial(nn.RMSNorm, width, eps=NORM_EPS)
        self.heads, self.head_dim = heads, width // heads
        self.token_embed = nn.Linear(channels, width)
        self.encoder_positions = nn.Parameter(torch.empty(1, length, width))
        self.token_norm = norm()
        self.encoder_blocks = nn.ModuleList(block() for _ in range(encoder_depth))
        self.encoder_norm = norm()
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_positions = nn.Parameter(torch.empty(1, length, width))
        self.decoder_blocks = nn.ModuleList(block() for _ in range(decoder_depth))
        self.decoder_norm = norm()
        self.register_buffer("rotary", axial_rows(coordinates, self.head_dim), persistent=False)
        self.register_buffer("slots", torch.arange(length), persistent=False)
        xavier_linear(self.modules())  # also where adaLN usually starts at zero
        for table in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table, std=0.02)

    @property
    def modulation_numbers(self) -> int:
        """How many numbers the modulations of one condition vector are."""
        return sum(block.modulation.out_features for block in (*self.encoder_blocks, *self.decoder_blocks))

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Condition vectors `[..., width]` -> the modulation `[..., 6 width]` of every block."""
        activated = F.silu(condition)
        return [block.modulation(activated) for block in (*self.encoder_blocks, *self.decoder_blocks)]

    def forward(self, x: Tensor, modulations: Sequence[Tensor], *, slots: slice = slice(None),
                groups: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states `[B, n, width]`.

        Args:
            x: embedded tokens `[B, n, width]`.
            modulations: of every block, `[B, G, 6 width]`.
            slots: where in the sequence the tokens are.
            groups: `[n]` which of the G modulations a token has; None: there is one for all.
            mask: `[n, keys]`, True where attended; None for everything.
            cache: where keys and values are kept, at the same slots.
        """
        def run(x: Tensor, blocks: nn.ModuleList, first: int) -> Tensor:
            for layer, block in enumerate(blocks, first):
                modulation = modulations[layer] if groups is None else modulations[layer].index_select(1, groups)
                x = block(x, modulation, rows, mask, cache, layer, places)
            return x

        rows, places = self.rotary[slots], self.slots[slots]
        x = self.token_norm(x + self.encoder_positions[:, slots])
        x = self.encoder_norm(run(x, self.encoder_blocks, 0))
        x = self.decoder_embed(x) + self.decoder_positions[:, slots]
        return self.decoder_norm(run(x, self.decoder_blocks, len(self.encoder_blocks)))

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache of all slots."""
        weight = self.token_norm.weight
        return KVCache(layers=len(self.encoder_blocks) + len(self.decoder_blocks), batch=batch, heads=self.heads,
                       slots=len(self.slots), head_dim=self.head_dim, dtype=weight.dtype, device=weight.device)


def rotary_frequencies(head_dim: int) -> Tensor:
    """The buffer `rope.freqs` of official files: frequencies of one axis, `[head_dim / 4]`."""
    part = head_dim // 2
    return 1.0 / 10000.0 ** (torch.arange(0, part, 2).float() / part)


def modulated_transformer_rules(model: ModulatedTransformer) -> list[Rule]:
    """Key map rules of the transformer, which is `backbone` with us and has no prefix officially."""
    names = {
        "z_proj.{p}": "token_embed.{p}",
        "z_proj_ln.{p}": "token_norm.{p}",
        "encoder_pos_embed_learned": "encoder_positions",
        "decoder_pos_embed_learned": "decoder_positions",
        "{stack}_blocks.{i}.ada_lin.1.{p}": "{stack}_blocks.{i}.modulation.{p}",
        "encoder_norm.{p}": "encoder_norm.{p}",
        "decoder_embed.{p}": "decoder_embed.{p}",
        "decoder_norm.{p}": "decoder_norm.{p}",
    }
    rules: list[Rule] = [Rename(official, f"backbone.{ours}") for official, ours in names.items()]
    frequencies = partial(rotary_frequencies, model.head_dim)
    for stack, blocks in (("encoder", model.encoder_blocks), ("decoder", model.decoder_blocks)):
        rules += [Ignore(f"{stack}_blocks.{i}.attn.rope.freqs", frequencies) for i in range(len(blocks))]
        rules += [Rename(f"{stack}_blocks.{{i}}.{part}.{{rest*}}", f"backbone.{stack}_blocks.{{i}}.{part}.{{rest*}}")
                  for part in ("attn", "mlp")]
    return rules
