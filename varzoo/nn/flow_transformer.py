"""FlowAR's flow-matching head (arXiv 2412.15205; official code): a small transformer over the tokens of one scale.

Its condition is a vector per token. In "plain" blocks that modulates every token by itself ("spatial adaLN"); in
"cross" blocks the tokens attend to all vectors of the scale as well. What depends on the condition alone is computed
once before a solver's loop, see `prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from varzoo.core.errors import unknown
from varzoo.core.keymap import Ignore, Rename, Rule
from varzoo.nn.denoiser import FREQUENCIES, time_frequencies
from varzoo.nn.initial import xavier_linear
from varzoo.nn.modulated_transformer import (
    NORM_EPS,
    Attention,
    ModulatedBlock,
    geglu,
    plain_norm,
    rotary_frequencies,
    time_index,
)
from varzoo.nn.rotary import rotate

MLP_RATIO = 4.0
KeysValues = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Attention of tokens to condition vectors at the same rotary positions."""

    def __init__(self, *, width: int, condition_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(condition_width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def keys_values(self, condition: Tensor, rows: Tensor) -> KeysValues:
        """Condition `[B, n, D]` -> keys and values `[B, heads, n, head_dim]`."""
        k, v = self.kv(condition).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=2)
        return rotate(k, rows).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rows: Tensor, keys_values: KeysValues) -> Tensor:
        q = rotate(self.q(x).unflatten(-1, (self.heads, -1)), rows).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, *keys_values).transpose(1, 2).flatten(2))


class PlainBlock(ModulatedBlock):
    """The shared block, every token with a modulation of its own."""

    def __init__(self, *, width: int, condition_width: int, heads: int) -> None:
        super().__init__(width=width, heads=heads, mlp_ratio=MLP_RATIO, qkv_bias=False, attention_dropout=0.0,
                         projection_dropout=0.0)

    def prepare(self, condition: Tensor, rows: Tensor) -> None:
        return None

    def run(self, x: Tensor, time: Tensor, activated: Tensor, rows: Tensor, prepared: None) -> Tensor:
        return self(x, self.modulation(activated), rows)


class CrossBlock(nn.Module):
    """Self-attention modulated by time, cross-attention, and an MLP modulated by time and condition.

    Each modulation is a gate, a scale and a shift, in this order.
    """

    def __init__(self, *, width: int, condition_width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width=width, heads=heads, qkv_bias=False, attention_dropout=0.0, projection_dropout=0.0)
        self.cross = CrossAttention(width=width, condition_width=condition_width, heads=heads)
        self.query_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.condition_norm = nn.RMSNorm(condition_width, eps=NORM_EPS)
        self.mlp = geglu(width, MLP_RATIO, 0.0)
        self.attn_modulation = nn.Linear(width, 3 * width)
        self.mlp_modulation = nn.Linear(width, 3 * width)

    def prepare(self, condition: Tensor, rows: Tensor) -> KeysValues:
        return self.cross.keys_values(self.condition_norm(condition), rows)

    def run(self, x: Tensor, time: Tensor, activated: Tensor, rows: Tensor, prepared: KeysValues) -> Tensor:
        gate, scale, shift = self.attn_modulation(F.silu(time)).chunk(3, dim=-1)
        x = x + gate * self.attn(plain_norm(x) * (1 + scale) + shift, rows)
        x = x + self.cross(self.query_norm(x), rows, prepared)
        gate, scale, shift = self.mlp_modulation(activated).chunk(3, dim=-1)
        return x + gate * self.mlp(plain_norm(x) * (1 + scale) + shift)


BLOCKS = {"plain": PlainBlock, "cross": CrossBlock}


@dataclass(frozen=True)
class Prepared:
    """What depends on the condition alone.

    Args:
        condition: `[B, n, width]`, embedded.
        blocks: keys and values of every cross block.
        rows: rotary rows of the scale.
    """

    condition: Tensor
    blocks: Sequence[KeysValues | None]
    rows: Tensor

    def first(self, batch: int) -> Prepared:
        """The part of the first samples."""
        blocks = [None if block is None else (block[0][:batch], block[1][:batch]) for block in self.blocks]
        return Prepared(self.condition[:batch], blocks, self.rows)


class FlowTransformer(nn.Module):
    """Noisy tokens of one scale, time and a condition per token -> velocities.

    Args:
        channels: C of a token.
        condition_width: width of the condition vectors.
        width, depth, heads: size.
        block: "plain" or "cross".
    """

    def __init__(self, *, channels: int, condition_width: int, width: int, depth: int, heads: int, block: str) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise unknown("block of the flow head", block, BLOCKS)
        if width % heads:
            raise ValueError(f"the flow head's width {width} must be a multiple of its {heads} heads.")
        self.head_dim = width // heads
        self.time_embed = TimestepEmbedding(FREQUENCIES, width)
        self.condition_embed = nn.Linear(condition_width, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(BLOCKS[block](width=width, condition_width=condition_width, heads=heads)
                                    for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        xavier_linear(self.modules())  # also where adaLN usually starts at zero
        for layer in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # the head starts as the zero function

    def time_vectors(self, times: Tensor) -> Tensor:
        """Times `[K]` in [0, 1] -> vectors `[K, width]`."""
        weight = self.input.weight
        return self.time_embed(time_frequencies(time_index(times).to(weight.device)).to(weight.dtype))

    def prepare(self, condition: Tensor, rows: Tensor) -> Prepared:
        """Condition `[B, n, condition_width]` at rotary rows `[n, head_dim / 2, 2]`."""
        blocks: Any = self.blocks
        return Prepared(self.condition_embed(condition), [block.prepare(condition, rows) for block in blocks], rows)

    def forward(self, noised: Tensor, time: Tensor, prepared: Prepared) -> Tensor:
        """Velocities `[B, n, C]` of noised `[B, n, C]` at time vectors `[B or 1, width]`."""
        time = time[:, None]
        activated = F.silu(time + prepared.condition)
        x = self.input(noised)
        block: Any
        for block, part in zip(self.blocks, prepared.blocks):
            x = block.run(x, time, activated, prepared.rows, part)
        shift, scale = self.final_modulation(activated).chunk(2, dim=-1)
        return self.output(plain_norm(x) * (1 + scale) + shift)


def flow_transformer_rules(head: FlowTransformer, official: str, ours: str) -> list[Rule]:
    """Key map rules of the head, below the two prefixes."""
    names = {
        "time_embed.mlp.0.{p}": "time_embed.linear_1.{p}",
        "time_embed.mlp.2.{p}": "time_embed.linear_2.{p}",
        "cond_embed.{p}": "condition_embed.{p}",
        "input_proj.{p}": "input.{p}",
        "res_blocks.{i}.attn.{j}.{p}": "blocks.{i}.attn.{j}.{p}",
        "res_blocks.{i}.crossattn.{j}.{p}": "blocks.{i}.cross.{j}.{p}",
        "res_blocks.{i}.norm2_1.{p}": "blocks.{i}.query_norm.{p}",
        "res_blocks.{i}.norm2_2.{p}": "blocks.{i}.condition_norm.{p}",
        "res_blocks.{i}.mlp.{j}.{p}": "blocks.{i}.mlp.{j}.{p}",
        "res_blocks.{i}.ada_lin.{p}": "blocks.{i}.modulation.{p}",
        "res_blocks.{i}.ada_lin_attn.{p}": "blocks.{i}.attn_modulation.{p}",
        "res_blocks.{i}.ada_lin_mlp.{p}": "blocks.{i}.mlp_modulation.{p}",
        "final_layer.adaLN_modulation.1.{p}": "final_modulation.{p}",
        "final_layer.linear.{p}": "output.{p}",
    }
    buffers = [f"{official}res_blocks.{i}.{part}.rope.freqs" for i, block in enumerate(head.blocks)
               for part in (("attn", "crossattn") if isinstance(block, CrossBlock) else ("attn",))]
    return [*(Ignore(buffer, lambda: rotary_frequencies(head.head_dim)) for buffer in buffers),
            *(Rename(official + theirs, ours + name) for theirs, name in names.items())]
