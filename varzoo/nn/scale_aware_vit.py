"""The transformer of Hi-MAR (arXiv 2505.20288, 3.2): one masked ViT for several phases, whose blocks know the phase.

The official code is followed where the paper differs: a phase is a learned vector, and a block has no shift.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from varzoo.nn.initial import xavier_linear
from varzoo.nn.masked_vit import MaskedViT, Stack, attend_at
from varzoo.nn.rows import take_rows


class ScaleAwareBlock(Block):
    """timm's block with scales and gates that depend on the phase: h + gate * attn((1 + scale) * norm(h)), and so on.

    Args:
        phases: how many phases there are.
    """

    def __init__(self, width: int, heads: int, *, phases: int, **settings: Any) -> None:
        super().__init__(width, heads, **settings)
        self.phase_scale = nn.Parameter(torch.zeros(phases, 4 * width))
        self.phase_shift = nn.Parameter(torch.tensor([0.0, 1, 0, 1]).repeat_interleave(width).repeat(phases, 1))

    def modulation(self, vector: Tensor, phase: int) -> tuple[Tensor, ...]:
        """The scale and gate of the attention, then of the MLP, each `[D]`, for a vector `[4D]` that blocks share."""
        return (vector * self.phase_scale[phase] + self.phase_shift[phase]).chunk(4)

    def forward(self, tokens: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]  # modulated
        scale, gate, *_ = modulation
        return self._mlp(tokens + gate * self.attn((1 + scale) * self.norm1(tokens)), modulation)

    def at(self, tokens: Tensor, positions: Tensor, *, modulation: tuple[Tensor, ...]) -> Tensor:
        """`forward` at positions `[B, n]` alone."""
        scale, gate, *_ = modulation
        attention: Any = self.attn
        attended = attend_at(attention, (1 + scale) * self.norm1(tokens), positions)
        return self._mlp(take_rows(tokens, positions) + gate * attended, modulation)

    def _mlp(self, tokens: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        *_, scale, gate = modulation
        return tokens + gate * self.mlp((1 + scale) * self.norm2(tokens))


class PhaseVectors(nn.Module):
    """The vector `[4D]` of each phase that all blocks of a stack modulate themselves with."""

    def __init__(self, phases: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(phases, width)
        self.linear = nn.Linear(width, 4 * width)
        xavier_linear([self.linear])

    def forward(self, phase: int) -> Tensor:
        return self.linear(F.silu(self.embed.weight[phase]))


class ScaleAwareViT(MaskedViT):
    """A masked ViT that has position tables and mask tokens, one per position, for each phase; the rest is shared.

    Args:
        phases: how many phases there are.
        settings: see `MaskedViT`.
    """

    def __init__(self, *, phases: int, **settings: Any) -> None:
        super().__init__(block_type=partial(ScaleAwareBlock, phases=phases), **settings)
        encoder_width, decoder_width = self.decoder_embed.in_features, self.decoder_embed.out_features
        slots = self.buffer_size + self.length
        self.encoder_positions = nn.Parameter(torch.empty(phases, slots, encoder_width))
        self.mask_token = nn.Parameter(torch.empty(phases, self.length, decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(phases, slots, decoder_width))
        for table in (self.encoder_positions, self.mask_token, self.decoder_positions):
            nn.init.normal_(table, std=0.02)
        self.encoder_phases = PhaseVectors(phases, encoder_width)
        self.decoder_phases = PhaseVectors(phases, decoder_width)

    def stack(self, phase: int) -> Stack:  # type: ignore[override]  # a pass per phase
        """The pass of a phase."""
        encoder_blocks: Any = self.encoder_blocks
        decoder_blocks: Any = self.decoder_blocks
        encoder_vector, decoder_vector = self.encoder_phases(phase), self.decoder_phases(phase)
        encoder, decoder = (
            [partial(block, modulation=block.modulation(vector, phase)) for block in blocks]
            for blocks, vector in ((encoder_blocks, encoder_vector), (decoder_blocks[:-1], decoder_vector)))
        last = decoder_blocks[-1]
        return Stack(
            encoder_positions=self.encoder_positions[phase], encoder=encoder,
            masks=F.pad(self.mask_token[phase], (0, 0, self.buffer_size, 0)),  # the buffer is never masked
            decoder_positions=self.decoder_positions[phase], decoder=decoder,
            last_at=partial(last.at, modulation=last.modulation(decoder_vector, phase)))
