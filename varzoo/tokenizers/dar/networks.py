"""D-AR's three transformers: image -> queries, codes -> contexts, noised image and a group of contexts -> velocity.

Heads are 64 wide, queries and keys are normalised per head. Layer norms have no weights but where the official code has
some: before the branches of encoder and contexts, and on queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.nn.kv_cache import KVCache
from varzoo.nn.patches import patchify, unpatchify
from varzoo.nn.rotary import axial_table, identity_rows, rotate

HEAD_DIM = 64
NORM_EPS = 1e-6
TABLE_ROWS = 1024  # of the official tables of queries and positions, however many are used


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def initialise(network: nn.Module, width: int) -> None:
    """Truncated normals in every linear layer, biases 0: of deviation 0.02 at the released width of 768, as officially.

    At other widths the deviation is scaled, so that signals begin equally large: in a narrow network at 0.02 what
    cross-attention reads is so small that training forgets the tokens.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02 * (768 / width) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def grid_of(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """The (h, w) grid of patches of an image (height, width). ValueError if they do not divide it."""
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} do not split into patches of {patch_size} x {patch_size}: "
                         "choose sides that are multiples of it.")
    return height // patch_size, width // patch_size


class Attention(nn.Module):
    """Attention with normalised queries and keys, to itself or to a context of the same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % HEAD_DIM:
            raise ValueError(f"width {width} must be a multiple of {HEAD_DIM}, the width of a head.")
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_DIM, eps=NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None, *, query_rows: Tensor | None = None,
                key_rows: Tensor | None = None, mask: Tensor | None = None, causal: bool = False,
                cache: KVCache | None = None, layer: int = 0, slots: Tensor | None = None) -> Tensor:
        """x `[B, n, width]` attends to itself, or to context `[B, m, width]`.

        Args:
            query_rows, key_rows: rotary rows `[n, 32, 2]` and `[m, 32, 2]`; None turns nothing.
            mask, causal: what is visible, as in `scaled_dot_product_attention`.
            cache, layer, slots: where keys and values are kept, and which keys are then read.
        """
        context = x if context is None else context
        q, k, v = (project(source).unflatten(-1, (-1, HEAD_DIM))
                   for project, source in ((self.q, x), (self.k, context), (self.v, context)))
        q, k = self.q_norm(q), self.k_norm(k)
        q = q if query_rows is None else rotate(q, query_rows)
        k = k if key_rows is None else rotate(k, key_rows)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if cache is not None:
            assert slots is not None, "a cache is written at slots"
            k, v = cache.update(layer, slots, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


class GatedBlock(nn.Module):
    """x + gate * attention(norm(x)), then x + gate * mlp(norm(x)); the gates are learned vectors, 0 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.attention = Attention(width)
        self.mlp = Mlp(width, 4 * width, act_layer=nn.SiLU)
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: Tensor, **attention: object) -> Tensor:
        x = x + self.attention_gate * self.attention(self.attention_norm(x), **attention)
        return x + self.mlp_gate * self.mlp(self.mlp_norm(x))


class QueryEncoder(nn.Module):
    """Learned queries read an image's patches; a query sees all patches and the queries before it.

    Args:
        image_size: (height, width).
        patch_size: side of a patch.
        width, depth: of the transformer.
        queries: number of queries N, at most 1024.
        query_rank: width of the query table before a linear layer, None for a table of the full width.
        rotary_base: of the patches' two-dimensional rotary positions; queries have none.
        code_channels: of the latents.
    """

    rotary: Tensor
    visible: Tensor

    def __init__(self, *, image_size: Sequence[int], patch_size: int, width: int, depth: int, queries: int,
                 query_rank: int | None, rotary_base: float, code_channels: int) -> None:
        super().__init__()
        require_rows(queries)
        grid = grid_of(image_size, patch_size)
        self.queries, self.patches = queries, grid[0] * grid[1]
        self.patchify = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.query_table = nn.Embedding(TABLE_ROWS, query_rank or width)
        self.query_projection = nn.Linear(query_rank, width) if query_rank else nn.Identity()
        self.blocks = nn.ModuleList(GatedBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, code_channels, bias=False)
        initialise(self, width)
        nn.init.trunc_normal_(self.query_table.weight, std=1.0 if query_rank else 0.02)
        rows = torch.cat([axial_table(grid, HEAD_DIM, rotary_base), identity_rows(queries, HEAD_DIM)])
        visible = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        visible[:, :self.patches] = True
        self.register_buffer("rotary", rows, persistent=False)
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, N, code_channels]`."""
        patches = norm(self.patchify(images).flatten(2).transpose(1, 2))
        queries = self.query_projection(self.query_table.weight[:self.queries])
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x, query_rows=self.rotary, key_rows=self.rotary, mask=self.visible)
        return self.head(norm(x[:, self.patches:]))


class CausalContexts(nn.Module):
    """Codes -> contexts, each of its own code and those before it: so contexts of a prefix never change.

    Args:
        code_channels: of the codes.
        width, depth: of the transformer.
        queries: number of codes N, at most 1024.
    """

    def __init__(self, *, code_channels: int, width: int, depth: int, queries: int) -> None:
        super().__init__()
        require_rows(queries)
        self.queries = queries
        self.from_codes = nn.Linear(code_channels, width, bias=False)
        self.positions = nn.Embedding(TABLE_ROWS, width)
        self.blocks = nn.ModuleList(GatedBlock(width) for _ in range(depth))
        initialise(self, width)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `[B, m, code_channels]`, the first m -> contexts `[B, m, width]`."""
        x = self.from_codes(codes) + self.positions.weight[:codes.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return norm(x)

    def extended(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Contexts `[B, n, width]` of the next n codes, after those in the cache; the cache takes them too."""
        start, end = cache.reach, cache.reach + codes.shape[1]
        cache.reach = end
        slots = torch.arange(start, end, device=codes.device)
        visible = torch.arange(end, device=codes.device) <= slots[:, None]
        x = self.from_codes(codes) + self.positions.weight[start:end]
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=visible, cache=cache, layer=layer, slots=slots)
        return norm(x)

    def new_cache(self, batch: int) -> KVCache:
        """A cache that nothing was fed to yet."""
        weight = self.positions.weight
        cache = KVCache(layers=len(self.blocks), batch=batch, heads=weight.shape[1] // HEAD_DIM, slots=self.queries,
                        head_dim=HEAD_DIM, dtype=weight.dtype, device=weight.device)
        cache.reach = 0
        return cache


class VelocityBlock(nn.Module):
    """A transformer block of image tokens, modulated per token by the time and by what it reads in the context.

    What cross-attention gives is no residual branch: it is added to the time's vector, and shifts, scales and gates.
    """

    def __init__(self, width: int, shared_time: bool) -> None:
        super().__init__()
        self.time_embed = None if shared_time else TimestepEmbedding(width, width)
        self.context_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.cross_attention, self.attention = Attention(width), Attention(width)
        self.mlp = Mlp(width, 4 * width, act_layer=nn.SiLU)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, rows: Tensor) -> Tensor:
        """x `[B, h w, width]`; time `[B, width]`, its frequencies or the shared embedding; context `[B, Q, width]`."""
        time = time if self.time_embed is None else self.time_embed(time)
        read = self.cross_attention(norm(x), norm(self.context_embed(context)), query_rows=rows)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(time[:, None] + read)).chunk(6, -1)
        x = x + gate_a * self.attention(norm(x) * (1 + scale_a) + shift_a, query_rows=rows, key_rows=rows)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


class VelocityNetwork(nn.Module):
    """Noised image, time and a group of contexts -> velocity.

    Args:
        image_size: (height, width).
        patch_size: side of a patch.
        width, depth: of the transformer.
        context_width: of the contexts.
        rotary_base: of the patches' two-dimensional rotary positions.
        shared_time: one embedding of the time for all blocks (the released model has one each).
        modulated_output: modulate the output by the time, which then is shared.
    """

    rotary: Tensor

    def __init__(self, *, image_size: Sequence[int], patch_size: int, width: int, depth: int, context_width: int,
                 rotary_base: float, shared_time: bool, modulated_output: bool) -> None:
        super().__init__()
        if modulated_output and not shared_time:
            raise ValueError("modulated_output needs shared_time: there is no time embedding of all blocks otherwise.")
        self.patch_size, self.grid, self.width = patch_size, grid_of(image_size, patch_size), width
        self.context_in = nn.Linear(context_width, width)
        self.time_embed = TimestepEmbedding(width, width) if shared_time else None
        self.blocks = nn.ModuleList(VelocityBlock(width, shared_time) for _ in range(depth))
        self.output_modulation = nn.Linear(width, 2 * width) if modulated_output else None
        self.head = nn.Linear(width, 3 * patch_size**2)
        initialise(self, width)
        self.input = nn.Linear(3 * patch_size**2, width)
        layer: Any
        for layer in (self.head, self.output_modulation, *(block.modulation for block in self.blocks)):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        self.register_buffer("rotary", axial_table(self.grid, HEAD_DIM, rotary_base), persistent=False)

    def forward(self, noised: Tensor, times: Tensor, contexts: Tensor, *, features_after: int | None = None,
                ) -> tuple[Tensor, Tensor | None]:
        """Velocity `[B, 3, H, W]`, and features for REPA.

        Args:
            noised: `[B, 3, H, W]`.
            times: `[B]` in [0, 1], 0 is noise.
            contexts: `[B, Q, context_width]`.
            features_after: index of the block after which the features `[B, h w, width]` are taken; None for none.
        """
        time = get_timestep_embedding(1000 * times, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = time.to(noised.dtype)
        time = time if self.time_embed is None else self.time_embed(time)
        context, features = norm(self.context_in(contexts)), None
        x = self.input(patchify(noised, self.patch_size))
        for index, block in enumerate(self.blocks):
            x = block(x, time, context, self.rotary)
            features = x if index == features_after else features
        x = norm(x)
        if self.output_modulation is not None:
            shift, scale = self.output_modulation(F.silu(time))[:, None].chunk(2, dim=-1)
            x = norm(x) * (1 + scale) + shift
        return unpatchify(self.head(x), self.patch_size, self.grid), features


def require_rows(queries: int) -> None:
    """Raise ValueError if there are more queries than the official tables have rows."""
    if not 1 <= queries <= TABLE_ROWS:
        raise ValueError(f"D-AR's tables have {TABLE_ROWS} rows, so there are between 1 and {TABLE_ROWS} queries, got "
                         f"{queries}.")
