"""The diffusion transformer head of Hi-MAR (arXiv 2505.20288, 3.3), after DiT (arXiv 2212.09748).

It denoises a whole map of tokens at once. Unlike DiT's, its condition, and so every modulation, is one per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from varzoo.core.keymap import Ignore, Rename, Rule
from varzoo.nn.denoiser import Denoiser


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed table `[h w, width]` of an (h, w) grid: the column in the first half of the channels, then the row.

    Each half is sines, then cosines, at frequencies 10000^(-j / (width / 4)).
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    return get_2d_sincos_pos_embed_from_grid(width, (columns, rows)).float()


class TransformerBlock(nn.Module):
    """DiT's adaLN-zero block (arXiv 2212.09748, 3.2) with a modulation `[..., N, 6W]` per token."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))  # type: ignore[arg-type]  # timm takes any
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        normed = self.norm(hidden) * (1 + scale1) + shift1
        hidden = hidden + gate1 * self.attn(normed.flatten(0, -3)).view_as(normed)
        return hidden + gate2 * self.mlp(self.norm(hidden) * (1 + scale2) + shift2)


class DiffusionTransformer(Denoiser):
    """A denoiser of whole maps `[..., N, C]`, N in raster order.

    Args:
        grid: (h, w) of the map.
        channels, out_channels, condition_width, width: see `Denoiser`; the width is a multiple of 4 and of `heads`.
        depth, heads, mlp_ratio: of the transformer.
    """

    positions: Tensor

    def __init__(self, *, grid: tuple[int, int], channels: int, out_channels: int, condition_width: int, width: int,
                 depth: int, heads: int, mlp_ratio: float) -> None:
        if width % 4 or width % heads:
            raise ValueError(f"the width of a diffusion transformer must be a multiple of 4 and of its {heads} heads, "
                             f"got {width}.")
        super().__init__(channels=channels, out_channels=out_channels, condition_width=condition_width, width=width,
                         blocks=(TransformerBlock(width, heads, mlp_ratio) for _ in range(depth)))
        self.register_buffer("positions", position_table(grid, width), persistent=False)

    def modulated(self, noised: Tensor, modulation: Iterable[Tensor]) -> Tensor:
        hidden, layers = self.input(noised), iter(modulation)
        hidden = hidden + self.positions.to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, next(layers))
        return self.final(hidden, next(layers))


def diffusion_transformer_rules(official: str, ours: str, grid: tuple[int, int], width: int) -> list[Rule]:
    """Key map rules of the head as Hi-MAR names it, below the two prefixes; its two tables are constants."""
    # Official embedders are 1x1 convolutions [W, C, 1, 1], ours linear [W, C].
    linear = {"convert": lambda weight: weight[..., 0, 0], "revert": lambda weight: weight[..., None, None]}
    names = {
        "x_embedder.proj.bias": "input.bias",
        "c_embedder.proj.bias": "condition_embed.bias",
        "t_embedder.mlp.0.{p}": "time_embed.linear_1.{p}",
        "t_embedder.mlp.2.{p}": "time_embed.linear_2.{p}",
        "blocks.{i}.adaLN_modulation.1.{p}": "blocks.{i}.modulation.{p}",
        "blocks.{i}.{part}.{layer}.{p}": "blocks.{i}.{part}.{layer}.{p}",
        "final_layer.linear.{p}": "final.linear.{p}",
        "final_layer.adaLN_modulation.1.{p}": "final.modulation.{p}",
    }
    return [
        Rename(f"{official}x_embedder.proj.weight", f"{ours}input.weight", **linear),
        Rename(f"{official}c_embedder.proj.weight", f"{ours}condition_embed.weight", **linear),
        *(Rename(official + theirs, ours + name) for theirs, name in names.items()),
        Ignore(f"{official}pos_embed", constant=lambda: position_table(grid, width)[None]),
        Ignore(f"{official}c_pos_embed", constant=lambda: torch.zeros(1, grid[0] * grid[1], width)),  # never used
    ]
