"""FlexTok's two transformers: latents -> registers, and noised latents with registers -> velocity.

LayerNorms have no weights, queries and keys are normalised per head and compared at scale 8 / head_dim; the decoder is
modulated by the time, patches and registers each in their own way. Of one sample's decoder tokens the dropped registers
(and, under the null condition, all registers) are identical: they carry no position. So one token stands for all of
them, and attention counts it as often as there are; a prefix of k tokens costs P + k + 1 tokens, not P + N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.errors import unknown
from varzoo.nn.llama import SwiGLU

NORM_EPS = 1e-5
TIME_CHANNELS = 256
SCALINGS = ("absolute", "interpolate")


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights over the last axis, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


def hidden_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of SwiGLU: two thirds of the MLP's, so that three matrices cost what two did."""
    return int(2 * int(width * mlp_ratio) / 3)


def sincos_table(height: int, width: int, channels: int, base: float = 10000.0) -> Tensor:
    """Fixed position embeddings `[channels, height, width]`: sine and cosine of the row, then of the column.

    As in the published code a table that is not square is scrambled: it is built column by column and read row by row.
    """
    frequencies = base ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    cells = torch.cartesian_prod(torch.arange(width), torch.arange(height)).double()
    angles = cells[..., None] * frequencies
    table = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    return table.float().view(height, width, channels).permute(2, 0, 1)


def fit_table(table: Tensor, grid: tuple[int, int], scaling: str) -> Tensor:
    """The part of a position table `[C, H, W]` that a grid (h, w) uses: cropped, or resized bilinearly: `[C, h, w]`."""
    if scaling == "interpolate":
        return F.interpolate(table[None], size=grid, mode="bilinear", align_corners=True)[0]
    if grid[0] > table.shape[1] or grid[1] > table.shape[2]:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches exceeds the position table of {table.shape[1]} x "
                         f"{table.shape[2]}; give a larger position_grid, or position_scaling=interpolate.")
    return table[:, :grid[0], :grid[1]]


def time_features(times: Tensor, channels: int = TIME_CHANNELS, last: float = 1.0, period: float = 256.0) -> Tensor:
    """Cosines, then sines, of times `[B]` in [0, last], at frequencies from 1000 / last down: `[B, channels]`."""
    return get_timestep_embedding(times * (1000 / last), channels, flip_sin_to_cos=True, downscale_freq_shift=0,
                                  max_period=period)  # type: ignore[arg-type]  # any number will do


class Patches(nn.Module):
    """Latents `[B, C, H, W]` -> embedded patches `[B, h w, width]`, with fixed positions.

    Args:
        channels: C.
        patch_size: side p of a patch, flattened as (row, column, channel).
        width: of the embeddings.
        position_grid: (h, w) of the position table.
        position_scaling: "absolute" crops the table to the grid, "interpolate" resizes it.
    """

    table: Tensor

    def __init__(self, *, channels: int, patch_size: int, width: int, position_grid: tuple[int, int],
                 position_scaling: str) -> None:
        super().__init__()
        if position_scaling not in SCALINGS:
            raise unknown("position scaling", position_scaling, SCALINGS)
        if width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 for positions on two axes.")
        self.patch_size, self.scaling = patch_size, position_scaling
        self.projection = nn.Linear(channels * patch_size**2, width)
        self.register_buffer("table", sincos_table(*position_grid, width), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        patches = rearrange(latents, "b c (h p) (w q) -> b h w (p q c)", p=self.patch_size, q=self.patch_size)
        positions = fit_table(self.table, (patches.shape[1], patches.shape[2]), self.scaling).permute(1, 2, 0)
        return (self.projection(patches) + positions).flatten(1, 2)


class SelfAttention(nn.Module):
    """Attention with normalised queries and keys; one fused projection whose rows are q, k, v."""

    def __init__(self, *, width: int, head_dim: int) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width {width} must be a multiple of head_dim {head_dim}.")
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, d=self.head_dim)
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(norm(q), norm(k), v, attn_mask=mask, scale=8 / self.head_dim)
        return self.out(rearrange(attended, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, *, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width=width, head_dim=head_dim)
        self.mlp = SwiGLU(width=width, hidden=hidden_width(width, mlp_ratio), dropout=0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(norm(x), mask)
        return x + self.mlp(norm(x))


class ModulatedBlock(Block):
    """A block whose norms are scaled and shifted, and whose branches are gated, by the time.

    Args:
        width, head_dim, mlp_ratio: see Block.
        groups: 1, or 2 to modulate registers apart from patches.
    """

    def __init__(self, *, width: int, head_dim: int, mlp_ratio: float, groups: int) -> None:
        super().__init__(width=width, head_dim=head_dim, mlp_ratio=mlp_ratio)
        self.groups = groups
        self.modulation = nn.Linear(width, groups * 6 * width)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor,  # type: ignore[override]  # it is modulated
                group: Tensor) -> Tensor:
        """x `[B, n, width]`; time `[B, width]` after its SiLU; group `[n]` of each token."""
        modulation = self.modulation(time).unflatten(-1, (self.groups, -1))[:, group]
        gate_attention, gate_mlp, shift_attention, scale_attention, shift_mlp, scale_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attention * self.attention(norm(x) * (1 + scale_attention) + shift_attention, mask)
        return x + gate_mlp * self.mlp(norm(x) * (1 + scale_mlp) + shift_mlp)


class RegisterEncoder(nn.Module):
    """Registers that read the patches of latents: a prefix language model over [patches | registers].

    Patches see all patches and no register; register i sees all patches and the registers 0 .. i, so the first k do not
    depend on how many follow.

    Args:
        channels: of the latents.
        patch_size, position_grid, position_scaling: see Patches.
        registers: N.
        out_channels: numbers per register, to be quantised.
        width, depth, head_dim, mlp_ratio: of the transformer.
    """

    def __init__(self, *, channels: int, patch_size: int, position_grid: tuple[int, int], position_scaling: str,
                 registers: int, out_channels: int, width: int, depth: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.patches = Patches(channels=channels, patch_size=patch_size, width=width, position_grid=position_grid,
                               position_scaling=position_scaling)
        self.registers = nn.Parameter(torch.empty(registers, width))
        self.blocks = nn.ModuleList(Block(width=width, head_dim=head_dim, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.head = nn.Linear(width, out_channels)
        initialise(self)  # the head too, which the published code begins at zero: see docs/flextok.md

    def embed(self, latents: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """What enters the first block, `[B, P + count, width]`, and who sees whom, `[P + count, P + count]`."""
        patches = self.patches(latents)
        registers = self.registers[:count].expand(len(latents), -1, -1)
        x = torch.cat([patches, registers], dim=1)
        at = torch.arange(x.shape[1], device=x.device)
        return x, (at <= at[:, None]) | (at < patches.shape[1])

    def forward(self, latents: Tensor, count: int | None = None) -> Tensor:
        """Latents `[B, C, H, W]` -> the first `count` registers (None: all) before quantisation, `[B, count, out]`."""
        x, mask = self.embed(latents, count)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(norm(x[:, x.shape[1] - len(self.registers[:count]):]))


@dataclass(frozen=True)
class Registers:
    """What the decoder sees of the tokens of a batch.

    Attributes:
        tokens: `[B, m, width]`; the last stands for all that are dropped.
        counts: `[B, m]` how often each counts in attention; 0: not at all.
    """

    tokens: Tensor
    counts: Tensor


class FlowDecoder(nn.Module):
    """Noised latents, their time and registers -> the velocity, noise - latents.

    Args:
        channels: of the latents.
        patch_size, position_grid, position_scaling: see Patches.
        registers: N, all that may be given.
        code_channels: numbers per register.
        width, depth, head_dim, mlp_ratio: of the transformer.
        modulations: 2: patches and registers are modulated apart (published); 1: alike.
        single_null: under the null condition there is one register, not N alike (published: false).
    """

    def __init__(self, *, channels: int, patch_size: int, position_grid: tuple[int, int], position_scaling: str,
                 registers: int, code_channels: int, width: int, depth: int, head_dim: int, mlp_ratio: float,
                 modulations: int, single_null: bool) -> None:
        super().__init__()
        if modulations not in (1, 2):
            raise ValueError(f"modulations is 1 (patches and registers alike) or 2 (apart), got {modulations}.")
        self.count, self.single_null = registers, single_null
        self.patches = Patches(channels=channels, patch_size=patch_size, width=width, position_grid=position_grid,
                               position_scaling=position_scaling)
        self.from_codes = nn.Linear(code_channels, width)
        self.positions = nn.Parameter(torch.empty(registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.null_token = nn.Parameter(torch.empty(width))
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width=width, head_dim=head_dim, mlp_ratio=mlp_ratio, groups=modulations)
            for _ in range(depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels * patch_size**2)
        initialise(self)
        nn.init.normal_(self.positions, std=0.5)  # published: 0.02, too alike for a short training to tell apart
        layer: Any
        for layer in (self.head_modulation, self.head, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)

    def registers(self, codes: Tensor, kept: Tensor, dropped: Tensor | None = None) -> Registers:
        """Codes `[B, k, code_channels]`, of which each sample keeps the first `kept` `[B]`, as the decoder sees them.

        Samples where `dropped` `[B]` is True get the null condition.
        """
        if dropped is None:
            dropped = torch.zeros_like(kept, dtype=torch.bool)
        known = self.from_codes(codes) + self.positions[:codes.shape[1]]
        kept = kept.masked_fill(dropped, 0)
        others = torch.where(dropped, 1 if self.single_null else self.count, self.count - kept)
        other = torch.where(dropped[:, None], self.null_token, self.mask_token)
        visible = torch.arange(codes.shape[1], device=codes.device) < kept[:, None]
        return Registers(torch.cat([known, other[:, None].to(known.dtype)], dim=1),
                         torch.cat([visible.float(), others[:, None].float()], dim=1))

    def null(self, batch: int) -> Registers:
        """The null condition of a batch: nothing is known."""
        count = 1 if self.single_null else self.count
        return Registers(self.null_token.expand(batch, 1, -1), self.null_token.new_full((batch, 1), count))

    def forward(self, latents: Tensor, times: Tensor, registers: Registers,
                features_after: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The velocity `[B, C, H, W]` of latents `[B, C, H, W]` at times `[B]` in [0, 1] (1 is noise).

        With `features_after`, also the patches `[B, P, width]` after that block.
        """
        patches = self.patches(latents)
        x, count = torch.cat([patches, registers.tokens.to(patches.dtype)], dim=1), patches.shape[1]
        # A key that counts n times has log n added to its logits.
        mask = F.pad(registers.counts.log(), (count, 0))[:, None, None]
        time = F.silu(self.time_embed(time_features(times).to(x.dtype)))
        group = (torch.arange(x.shape[1], device=x.device) >= count).long()
        features = None
        for index, block in enumerate(self.blocks):
            x = block(x, mask, time, group if block.groups == 2 else torch.zeros_like(group))
            if index == features_after:
                features = x[:, :count]
        shift, scale = self.head_modulation(time)[:, None].chunk(2, dim=-1)
        out = self.head(norm(x[:, :count]) * (1 + scale) + shift)
        size = self.patches.patch_size
        velocity = rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=latents.shape[2] // size, p=size, q=size)
        return velocity, features


def initialise(module: nn.Module) -> None:
    """The published initial weights, mostly: Xavier in linear layers, each of q, k and v by itself; 0.02 in tables."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("qkv.weight"):
            for part in parameter.data.chunk(3):
                nn.init.xavier_uniform_(part)
        elif name.endswith("weight"):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)
