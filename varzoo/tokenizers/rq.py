"""RQ-VAE: residual-quantised convolutional tokenizer (arXiv 2203.01941, section 3.1).

Official code: kakaobrain/rq-vae-transformer. The encoder shrinks the image, every latent vector becomes D codes whose
vectors add up to it, a decoder paints the sum; the first d codes alone decode to a coarser image. Published size:
multipliers [1, 1, 2, 2, 4, 4], width 128, 8 x 8 positions of 4 codes out of 16384 at 256 px.

As in the official code:
- there is no KL term: "VAE" is a name;
- a shared codebook moves after every level, so within one training step later levels search a codebook that has moved;
- the commitment loss averages over the partial sums of every level, not only over the last.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import Alias, KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.codebook import perplexity
from varzoo.nn.conv_autoencoder import (
    build_decoder,
    build_encoder,
    downsampling,
    image_and_grid,
    latent_diffusion_rules,
    require_images,
)
from varzoo.nn.residual_quantizer import Quantised, ResidualQuantizer
from varzoo.tokenizers.base import UINT8_RULES, Tokenizer

PREVIEWS = ("add", "select")


class RQTokenizer(Tokenizer):
    """RQ-VAE.

    Args:
        image_size: one side or (height, width) in pixels.
        width: channels of a level with multiplier 1, a multiple of 32.
        multipliers: widths by level, full resolution first; each level but the last halves the image.
        blocks_per_level: ResNet blocks of an encoder level (the decoder has one more).
        attention_levels: levels that attend, 0 at full resolution.
        z_channels: channels between the convolutional networks and the bottleneck.
        latent_channels: channels of a latent vector.
        fold: (height, width) of blocks of latent vectors that are quantised as one; (1, 1) for none, as published.
        codebook_size: number of codes K of a codebook.
        depth: codes D per position.
        shared: one codebook for all levels.
        decay: of the codebooks' moving averages.
        restart: whether dead codes are restarted in training.
        commitment: weight of the commitment loss (official 0.25).
        temperature: of the distributions over codes that `tokens` draws from and `extras` gives as targets (official
            0.5).
        uint8_rule: how decoded images are rounded.

    Tokens are ids `[B, N, D]` int64 (`[B, N]` with depth 1) in raster order. What is cached are the latents, so that
    ids may be drawn anew at every step of a generator's training.
    """

    goldens: ClassVar[tuple[str, ...]] = ("rqvae/autoencoder", "rqvae/*restart*")

    def __init__(self, *, image_size: int | Sequence[int], width: int, multipliers: Sequence[int],
                 blocks_per_level: int, attention_levels: Collection[int], z_channels: int, latent_channels: int,
                 fold: Sequence[int], codebook_size: int, depth: int, shared: bool, decay: float, restart: bool,
                 commitment: float, temperature: float, uint8_rule: str) -> None:
        super().__init__()
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        if temperature <= 0 or commitment < 0:
            raise ValueError(f"need temperature > 0 and commitment >= 0, got {temperature} and {commitment}.")
        self.image_size, latent_grid = image_and_grid(image_size, downsampling(multipliers))
        self.fold = (fold[0], fold[-1])
        if len(fold) != 2 or min(self.fold) < 1 or any(map(int.__mod__, latent_grid, self.fold)):
            raise ValueError(f"fold must be (height, width) that divide the latent grid {latent_grid}, got {fold}.")
        grid = tuple(map(int.__floordiv__, latent_grid, self.fold))
        self.spec = TokenSpec(kind="discrete", shape=grid, size=codebook_size, depth=depth)
        self.uint8_rule, self.commitment, self.temperature = uint8_rule, commitment, temperature
        self.levels = len(multipliers)

        self.encoder = build_encoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=attention_levels, out_channels=z_channels)
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.quantizer = ResidualQuantizer(size=codebook_size, channels=latent_channels * self.fold[0] * self.fold[1],
                                           depth=depth, shared=shared, decay=decay, restart=restart)
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
        self.decoder = build_decoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=attention_levels, in_channels=z_channels)

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latent vectors `[B, N, C]`, folded, not quantised."""
        require_images(images, self.image_size)
        return fold_latents(self.quant_conv(self.encoder(images)), self.fold)

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Latents -> ids: of the nearest codes, or drawn from the soft distributions of every level."""
        ids = (self.quantizer(compressed).ids if draws is None
               else self.quantizer.draw(compressed, self.temperature, draws))
        return ids[..., 0] if self.spec.depth == 1 else ids

    def extras(self, compressed: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """"soft_targets": the distributions `[B, N, (D,) K]` from which the tokens were drawn."""
        soft = self.quantizer.soft(compressed, self._stack(tokens), self.temperature)
        return {"soft_targets": soft[..., 0, :] if self.spec.depth == 1 else soft}

    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids -> images `[B, 3, H, W]`, not clamped. ValueError for ids of another shape or outside the codebook."""
        return self._paint(self.embed(tokens).sum(dim=-2))

    def preview(self, tokens: Tensor, level: int, kind: str = "add") -> Tensor:
        """Images `[B, 3, H, W]` of the first `level` codes of every position ("add"), or of that one alone ("select").

        Args:
            tokens: all ids.
            level: 1 to D.
        """
        if kind not in PREVIEWS:
            raise unknown("preview", kind, PREVIEWS)
        if not 1 <= level <= self.spec.depth:
            raise ValueError(f"level must lie in 1 to {self.spec.depth}, the depth of the code; got {level}.")
        vectors = self.embed(tokens)[..., :level, :]
        return self._paint(vectors.sum(dim=-2) if kind == "add" else vectors[..., -1, :])

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids -> the code vectors of every level, `[B, N, D, C]`, not summed."""
        expected = (self.spec.length, self.spec.depth)[:1 + (self.spec.depth > 1)]
        if tokens.shape[1:] != expected:
            raise ValueError(f"expected ids [B, {', '.join(map(str, expected))}] for {self.spec}, got "
                             f"{list(tokens.shape)}.")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.spec.size):
            raise ValueError(f"ids must lie in 0 to {self.spec.size - 1}, the codebook; got {int(tokens.min())} to "
                             f"{int(tokens.max())}.")
        return self.quantizer.embed(self._stack(tokens))

    def codebook(self) -> Tensor:
        """The code vectors `[K, C]` that all levels share, or `[D, K, C]` where each has its own."""
        return self.quantizer.vectors()

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """Reconstructions, straight-through, and the commitment loss; in training mode the codebooks learn.

        `parts` has it, weighted, as "commitment", and of every level d "usage_d", the share of codes that this batch
        uses, and "perplexity_d" of its ids, at most K.
        """
        latents = self.compress(images)
        quantised = self.quantizer(latents.detach(), draws if self.training else None)
        commitment = self.commitment * commitment_loss(latents, quantised)
        reconstructions = self._paint(straight_through(latents, quantised))
        statistics = {}
        for level, ids in enumerate(quantised.ids.unbind(-1), 1):
            statistics[f"usage_{level}"] = torch.tensor(len(ids.unique()) / self.spec.size)
            statistics[f"perplexity_{level}"] = perplexity(ids, self.spec.size)
        return reconstructions, Losses(commitment, {"commitment": commitment.detach()} | statistics)

    def last_decoder_weight(self) -> Tensor:
        return self.decoder.conv_out.weight

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "rqvae". The official tables end with an unused row of zeros."""
        pad = lambda vectors: F.pad(vectors, (0, 0, 0, 1))  # noqa: E731
        names = {"weight": "vectors", "cluster_size_ema": "counts", "embed_ema": "sums"}
        aliases = range(1, self.spec.depth) if len(self.quantizer.codebooks) == 1 else ()
        return {"rqvae": KeyMap([
            *latent_diffusion_rules(self.levels),
            *(Rename(f"{name}.{{p}}", f"{name}.{{p}}") for name in ("quant_conv", "post_quant_conv")),
            *(Alias(f"quantizer.codebooks.{level}.{name}", of=f"quantizer.codebooks.0.{name}")
              for level in aliases for name in names),
            *(Rename(f"quantizer.codebooks.{{d}}.{theirs}", f"quantizer.codebooks.{{d}}.{ours}",
                     convert=(lambda table: table[:-1].clone()) if theirs == "weight" else None,
                     revert=pad if theirs == "weight" else None) for theirs, ours in names.items()),
        ])}

    def _stack(self, tokens: Tensor) -> Tensor:
        return tokens[..., None] if self.spec.depth == 1 else tokens

    def _paint(self, vectors: Tensor) -> Tensor:
        """Vectors `[B, N, C]`, folded, -> images."""
        return self.decoder(self.post_quant_conv(unfold_latents(vectors, self.fold, self.spec.grid)))


def fold_latents(latents: Tensor, fold: tuple[int, int]) -> Tensor:
    """Latents `[B, C, H, W]` -> vectors `[B, N, p q C]` of blocks of p x q of them; rows, columns, channels inside."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=fold[0], q=fold[1])


def unfold_latents(vectors: Tensor, fold: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `fold_latents`, for a grid (h, w) of vectors."""
    return rearrange(vectors, "b (h w) (p q c) -> b c (h p) (w q)", p=fold[0], q=fold[1], h=grid[0], w=grid[1])


def commitment_loss(vectors: Tensor, quantised: Quantised) -> Tensor:
    """Mean over the levels of the mean squared error between vectors and the sum of their first codes."""
    return (vectors - quantised.partial_sums.detach()).square().mean()


def straight_through(vectors: Tensor, quantised: Quantised) -> Tensor:
    """The quantised vectors, with the gradient of the vectors."""
    return vectors + (quantised.partial_sums[-1] - vectors).detach()
