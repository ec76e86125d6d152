"""Feature maps as sequences of square patches, in raster order, and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(maps: Tensor, patch_size: int) -> Tensor:
    """Cut maps `[B, C, H, W]` into tokens `[B, N, C p p]`, each ordered (channel, row in patch, column in patch).

    Raises ValueError if height or width is no multiple of `patch_size`.
    """
    height, width = maps.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"a {height} x {width} map cannot be cut into patches of {patch_size} x {patch_size}.")
    return rearrange(maps, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Lay tokens `[B, N, C p p]` out on their (h, w) grid of patches as maps `[B, C, h p, w p]`."""
    h, w = grid
    if tokens.shape[1] != h * w:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {h} x {w} = {h * w} patches.")
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=patch_size, q=patch_size)
