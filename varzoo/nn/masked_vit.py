"""The asymmetric masked autoencoder transformer of MAR and its kin (arXiv 2406.11838, 4; after MAE, 2111.06377).

An encoder sees a buffer of condition slots and the visible tokens only; a decoder puts a mask token at every other
place and gives a vector for each position that is asked for. Attention is bidirectional, nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from varzoo.nn.initial import xavier_linear
from varzoo.nn.rows import put_rows, take_rows


def attend_at(attention: Attention, tokens: Tensor, positions: Tensor) -> Tensor:
    """`attention(tokens)` `[B, N, D]` at positions `[B, n]` alone: all are attended to, only `n` are computed."""
    heads = partial(torch.unflatten, dim=-1, sizes=(attention.num_heads, attention.head_dim))
    query_weight, key_value_weight = attention.qkv.weight.tensor_split([attention.attn_dim])
    query_bias, key_value_bias = attention.qkv.bias.tensor_split([attention.attn_dim])
    query = F.linear(take_rows(tokens, positions), query_weight, query_bias)
    key, value = F.linear(tokens, key_value_weight, key_value_bias).chunk(2, dim=-1)
    query, key, value = (heads(rows).transpose(1, 2) for rows in (query, key, value))
    dropout = attention.attn_drop.p if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(mixed))


def block_at(block: Block, tokens: Tensor, positions: Tensor) -> Tensor:
    """`block(tokens)` `[B, N, D]` at positions `[B, n]` alone."""
    attention: Any = block.attn
    rows = take_rows(tokens, positions) + attend_at(attention, block.norm1(tokens), positions)
    return rows + block.mlp(block.norm2(rows))


Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What one pass through a `MaskedViT` uses.

    Attributes:
        encoder_positions: `[buffer_size + N, encoder_width]`.
        encoder: the encoder's blocks.
        masks: the mask token of every slot, `[buffer_size + N, decoder_width]`, or one for all `[1, decoder_width]`.
        decoder_positions: `[buffer_size + N, decoder_width]`.
        decoder: the decoder's blocks but the last.
        last_at: the decoder's last block, (tokens, positions) -> the rows at those positions.
    """

    encoder_positions: Tensor
    encoder: Sequence[Layer]
    masks: Tensor
    decoder_positions: Tensor
    decoder: Sequence[Layer]
    last_at: Callable[[Tensor, Tensor], Tensor]


class MaskedViT(nn.Module):
    """Tokens known at some positions and a condition vector -> a vector for any position.

    A subclass may run the same pass through other tables and blocks (`stack`).

    Args:
        length: number of positions N.
        channels: channels C of a token.
        encoder_width, encoder_depth, encoder_heads: the encoder's size.
        decoder_width, decoder_depth, decoder_heads: the decoder's size; its depth is at least 1.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        buffer_size: slots before the tokens that hold the condition vector.
        norm_eps: of every LayerNorm.
        attention_dropout: on attention weights.
        projection_dropout: after attention projections and inside the MLPs.
        block_type: what makes a block; takes the arguments of timm's.
    """

    def __init__(self, *, length: int, channels: int, encoder_width: int, encoder_depth: int, encoder_heads: int,
                 decoder_width: int, decoder_depth: int, decoder_heads: int, mlp_ratio: float, buffer_size: int,
                 norm_eps: float, attention_dropout: float, projection_dropout: float,
                 block_type: Callable[..., Block] = Block) -> None:
        super().__init__()
        if buffer_size < 1 or decoder_depth < 1:
            raise ValueError("need at least one buffer slot and one decoder block, got "
                             f"buffer_size={buffer_size}, decoder_depth={decoder_depth}.")
        self.length, self.buffer_size = length, buffer_size
        norm = partial(nn.LayerNorm, eps=norm_eps)
        block = partial(block_type, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm, attn_drop=attention_dropout,
                        proj_drop=projection_dropout)
        self.token_embed = nn.Linear(channels, encoder_width)
        self.encoder_positions = nn.Parameter(torch.empty(1, buffer_size + length, encoder_width))
        self.token_norm = norm(encoder_width)
        self.encoder_blocks = nn.ModuleList(block(encoder_width, encoder_heads) for _ in range(encoder_depth))
        self.encoder_norm = norm(encoder_width)
        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(1, buffer_size + length, decoder_width))
        self.decoder_blocks = nn.ModuleList(block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_width)
        self.output_positions = nn.Parameter(torch.empty(1, length, decoder_width))
        self._initialise()

    def _initialise(self) -> None:
        xavier_linear(self.modules())
        for table in (self.encoder_positions, self.mask_token, self.decoder_positions, self.output_positions):
            nn.init.normal_(table, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor, condition: Tensor, at: Tensor) -> Tensor:
        """Vectors `[B, n, decoder_width]` at positions `at` `[B, n]`.

        Args:
            tokens: `[B, N, C]`; only the visible ones are read.
            visible: `[B, V]` int64, ascending positions that the encoder sees, as many for every sample.
            condition: `[B, encoder_width]`.
            at: `[B, n]` int64.
        """
        return self.decode(self.encode(tokens, visible, condition), visible, at)

    def encode(self, tokens: Tensor, visible: Tensor, condition: Tensor) -> Tensor:
        """Buffer slots, then visible tokens, encoded: `[B, buffer_size + V, encoder_width]`."""
        rows = self.token_embed(take_rows(tokens, visible).to(condition.dtype))
        return self.encode_rows(rows, visible, condition, self.stack())

    def decode(self, encoded: Tensor, visible: Tensor, at: Tensor) -> Tensor:
        """What `encode` gave -> vectors `[B, n, decoder_width]` at positions `at` `[B, n]`."""
        return self.decode_rows(encoded, visible, at, self.stack())

    def stack(self) -> Stack:
        """The only pass there is."""
        last: Any = self.decoder_blocks[-1]
        return Stack(
            encoder_positions=self.encoder_positions[0], encoder=[*self.encoder_blocks], masks=self.mask_token[0],
            decoder_positions=self.decoder_positions[0], decoder=[*self.decoder_blocks[:-1]],
            last_at=partial(block_at, last))

    def encode_rows(self, rows: Tensor, visible: Tensor, condition: Tensor, stack: Stack) -> Tensor:
        """`encode` of tokens that are embedded already, rows `[B, V, encoder_width]`, by a pass."""
        hidden = torch.cat([condition[:, None].expand(-1, self.buffer_size, -1), rows], dim=1)
        hidden = self.token_norm(hidden + stack.encoder_positions[self._slots(visible)])
        for block in stack.encoder:
            hidden = block(hidden)
        return self.encoder_norm(hidden)

    def decode_rows(self, encoded: Tensor, visible: Tensor, at: Tensor, stack: Stack) -> Tensor:
        """`decode` by a pass; only the rows `at` go through the second half of the last block and what follows it."""
        rows = self.decoder_embed(encoded)
        masked = stack.masks.to(rows.dtype).expand(len(rows), self.buffer_size + self.length, -1)
        hidden = put_rows(masked, self._slots(visible), rows) + stack.decoder_positions
        for block in stack.decoder:
            hidden = block(hidden)
        hidden = stack.last_at(hidden, at + self.buffer_size)
        return self.decoder_norm(hidden) + self.output_positions[0][at]

    def _slots(self, visible: Tensor) -> Tensor:
        """Places of buffer and visible tokens in the full sequence, `[B, buffer_size + V]`."""
        buffer = torch.arange(self.buffer_size, device=visible.device).expand(len(visible), -1)
        return torch.cat([buffer, visible + self.buffer_size], dim=1)
