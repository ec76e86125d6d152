"""VQ-16 and VQ-8: LlamaGen's convolutional VQ tokenizer (arXiv 2406.06525, section 2.1), also used by NAR and LANTERN.

An encoder shrinks the image, each latent vector becomes the nearest of K codes, a decoder paints the codes. Codes and
latents are compared on the unit sphere (`l2_norm`), so that few codes die. Published sizes: VQ-16, multipliers
[1, 1, 2, 2, 4], 71.88 M parameters; VQ-8, [1, 2, 2, 4], 70.11 M; both width 128, 2 blocks, 16384 codes of dimension 8.

Deviation: the entropy term is left out when its weight is 0, where the official code computes it and multiplies by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.codebook import entropy_loss, perplexity, squared_distances
from varzoo.nn.conv_autoencoder import (
    build_decoder,
    build_encoder,
    downsampling,
    image_and_grid,
    llamagen_rules,
    require_images,
)
from varzoo.tokenizers.base import UINT8_RULES, Tokenizer

USAGE_WINDOW = 65536  # ids over which codebook usage is counted


class VQTokenizer(Tokenizer):
    """LlamaGen's VQModel.

    Args:
        image_size: one side or (height, width) in pixels. The weights fit any multiple of the downsampling factor.
        width: channels of a level with multiplier 1, a multiple of 32.
        multipliers: the encoder's widths by level, full resolution first; each level but the last halves the image.
        decoder_multipliers: the decoder's, in the same order; None: those of the encoder.
        blocks_per_level: ResNet blocks of an encoder level (the decoder has one more). Only the lowest resolution
            attends, in both.
        z_channels: channels between the convolutional networks and the bottleneck.
        codebook_size: number of codes K.
        codebook_dim: dimension D of a code.
        l2_norm: compare latents and codes after normalising both to unit length.
        commitment: weight of the commitment loss (official 0.25).
        entropy_weight: weight of the entropy loss, which favours confident and diverse codes (official 0).
        uint8_rule: how decoded images are rounded (official "half_up").

    Tokens are ids `[B, N]` int64 in raster order; `spec.shape` is the latent grid.
    """

    goldens: ClassVar[tuple[str, ...]] = ("llamagen/vq_*",)
    recent_ids: Tensor

    def __init__(self, *, image_size: int | Sequence[int], width: int, multipliers: Sequence[int],
                 blocks_per_level: int, z_channels: int, codebook_size: int, codebook_dim: int, l2_norm: bool,
                 commitment: float, entropy_weight: float, decoder_multipliers: Sequence[int] | None = None,
                 uint8_rule: str = "half_up") -> None:
        super().__init__()
        decoder_multipliers = multipliers if decoder_multipliers is None else decoder_multipliers
        if len(decoder_multipliers) != len(multipliers):
            raise ValueError(f"encoder and decoder must have equally many levels, got multipliers {list(multipliers)} "
                             f"and decoder_multipliers {list(decoder_multipliers)}.")
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        self.image_size, grid = image_and_grid(image_size, downsampling(multipliers))
        self.spec = TokenSpec(kind="discrete", shape=grid, size=codebook_size)
        self.uint8_rule = uint8_rule
        self.l2_norm = l2_norm
        self.commitment = commitment
        self.entropy_weight = entropy_weight

        lowest = (len(multipliers) - 1,)
        self.encoder = build_encoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=lowest, out_channels=z_channels)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.decoder = build_decoder(width=width, multipliers=decoder_multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=lowest, in_channels=z_channels)
        self.register_buffer("recent_ids", torch.zeros(USAGE_WINDOW, dtype=torch.int64))

        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        with torch.no_grad():
            self.embedding.weight.copy_(self._comparable(self.embedding.weight))

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> ids `[B, N]`."""
        return self._nearest(self._comparable(self._sequence(self.latents(images))))

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids are tokens already, there is nothing to draw."""
        return compressed

    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids `[B, N]` -> images `[B, 3, H, W]`, not clamped. ValueError for ids that are not in the codebook."""
        return self._paint(self.lookup(tokens))

    def latents(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, D, h, w]`, neither normalised nor quantised."""
        require_images(images, self.image_size)
        return self.quant_conv(self.encoder(images))

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids `[B, N]` -> their code vectors on the grid, `[B, D, h, w]`, as the decoder takes them."""
        if ids.ndim != 2 or ids.shape[1] != self.spec.length:
            raise ValueError(f"expected ids [B, {self.spec.length}] for {self.spec}, got {list(ids.shape)}.")
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.spec.size):
            raise ValueError(f"ids must lie in 0 to {self.spec.size - 1}, the codebook; got {int(ids.min())} to "
                             f"{int(ids.max())}. A generator with a larger vocabulary must clamp or mask it first.")
        return self._grid(F.embedding(ids, self.codebook()))

    def codebook(self) -> Tensor:
        """The code vectors `[K, D]` as decoded: of unit length with `l2_norm`."""
        return self._comparable(self.embedding.weight)

    def stored_codebook(self) -> Tensor:
        return self.embedding.weight

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """Reconstructions, straight-through, and the codebook, commitment and entropy losses (arXiv 1711.00937, eq. 3).

        `parts` has them, weighted, as "vq", "commitment" and (if its weight is not 0) "entropy"; "codebook_usage", the
        share of codes among the last 65536 ids of training (which begin as zeros, so that id 0 counts); and
        "perplexity", the exponential entropy of this batch's ids, at most K. In eval mode a batch is counted as well,
        but not remembered.
        """
        latents = self._comparable(self._sequence(self.latents(images)))
        ids = self._nearest(latents)
        codes = F.embedding(ids, self.codebook())
        parts = {
            "vq": F.mse_loss(codes, latents.detach()),
            "commitment": self.commitment * F.mse_loss(latents, codes.detach()),
        }
        if self.entropy_weight:
            parts["entropy"] = self.entropy_weight * entropy_loss(-squared_distances(latents, self.codebook()))
        total = sum(parts.values(), torch.zeros((), device=latents.device))
        reconstructions = self._paint(self._grid(latents + (codes - latents).detach()))
        statistics = {"codebook_usage": self._usage(ids), "perplexity": perplexity(ids, self.spec.size)}
        return reconstructions, Losses(total, {name: part.detach() for name, part in (parts | statistics).items()})

    def last_decoder_weight(self) -> Tensor:
        return self.decoder.conv_out.weight

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "llamagen" (files keep it under the key `model`)."""
        return {"llamagen": KeyMap([
            *llamagen_rules(),
            Rename("quantize.embedding.weight", "embedding.weight"),
            Rename("quantize.codebook_used", "recent_ids", convert=Tensor.long, revert=Tensor.float),
            Rename("quant_conv.{p}", "quant_conv.{p}"),
            Rename("post_quant_conv.{p}", "post_quant_conv.{p}"),
        ])}

    def _paint(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    def _nearest(self, latents: Tensor) -> Tensor:
        return squared_distances(latents, self.codebook()).argmin(dim=-1)

    def _usage(self, ids: Tensor) -> Tensor:
        recent = torch.cat([self.recent_ids, ids.flatten()])[-USAGE_WINDOW:]
        if self.training:
            self.recent_ids.copy_(recent)
        used = torch.zeros(self.spec.size, dtype=torch.bool, device=ids.device)
        used[recent] = True
        return used.float().mean()

    def _sequence(self, maps: Tensor) -> Tensor:
        return rearrange(maps, "b d h w -> b (h w) d")

    def _grid(self, vectors: Tensor) -> Tensor:
        h, w = self.spec.shape
        return rearrange(vectors, "b (h w) d -> b d h w", h=h, w=w)
