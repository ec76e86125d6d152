"""KL-16: the continuous tokenizer of MAR (arXiv 2406.11838), a latent-diffusion autoencoder (arXiv 2112.10752).

An encoder gives the mean and log variance of a Gaussian posterior per latent pixel; a cache stores those moments, so
that every epoch can draw afresh. Tokens are `scale * (latent - shift)`, of about unit variance. The published VAE:
width 128, multipliers [1, 1, 2, 2, 4], 2 blocks, attention at level 4, 16 channels, scale 0.2325, 66.46 M parameters.

Reproduced fault: the decoder has no attention outside its middle (its authors forgot it and kept it so).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.conv_autoencoder import (
    GROUPS,
    build_decoder,
    build_encoder,
    downsampling,
    image_and_grid,
    latent_diffusion_rules,
    require_images,
)
from varzoo.nn.patches import patchify, unpatchify
from varzoo.tokenizers.base import UINT8_RULES, Tokenizer

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class KLTokenizer(Tokenizer):
    """MAR's AutoencoderKL with the patching and scaling of its latents.

    Args:
        image_size: one side or (height, width) in pixels. The weights fit any multiple of the downsampling factor.
        width: channels of a level with multiplier 1, a multiple of 32.
        multipliers: widths by level, full resolution first; each level but the last halves the image.
        blocks_per_level: ResNet blocks of an encoder level (the decoder has one more).
        attention_levels: encoder levels that attend; 0 is the full resolution (official: [4]).
        latent_channels: channels C of the latents.
        patch_size: p; a token is a p x p block of latents, flattened as (channel, row, column).
        scale: tokens = scale * (latents - shift). For a new VAE take it from `latent_statistics`.
        shift: see `scale` (official 0).
        kl_weight: weight of the KL divergence, which is summed over a sample's latents. A reconstruction loss that is a
            mean over pixels needs 1e-6 or less, or channels collapse.
        variational: without it (MAR's `use_variational=False`) only means are learned and the log variance is 1.
        norm_groups: of every GroupNorm (32 in all published VAEs).
        uint8_rule: how decoded images are rounded (official "round").

    Tokens are `[B, N, C p p]` float in raster order over the patches; `spec.shape` is the grid of patches.
    """

    goldens: ClassVar[tuple[str, ...]] = ("mar/vae_*",)

    def __init__(self, *, image_size: int | Sequence[int], width: int, multipliers: Sequence[int],
                 blocks_per_level: int, attention_levels: Collection[int], latent_channels: int, patch_size: int,
                 scale: float, shift: float, kl_weight: float, variational: bool = True, norm_groups: int = GROUPS,
                 uint8_rule: str = "round") -> None:
        super().__init__()
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        if scale == 0:
            raise ValueError("scale must not be 0; take it from latent_statistics, or 0.2325 for MAR's VAE.")
        self.factor = downsampling(multipliers) * patch_size
        self.image_size, grid = image_and_grid(image_size, self.factor)
        self.spec = TokenSpec(kind="continuous", shape=grid, size=latent_channels * patch_size**2)
        self.uint8_rule = uint8_rule
        self.patch_size = patch_size
        self.scale, self.shift = scale, shift
        self.kl_weight = kl_weight
        self.variational = variational

        self.encoder = build_encoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=attention_levels, out_channels=2 * latent_channels,
                                     groups=norm_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, latent_channels * (2 if variational else 1), 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = build_decoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=(), in_channels=latent_channels, groups=norm_groups)

    def at_size(self, image_size: int | Sequence[int]) -> KLTokenizer:
        other = copy.copy(self)  # shallow: every module and parameter is this one's
        other.image_size, grid = image_and_grid(image_size, self.factor)
        other.spec = replace(self.spec, shape=grid)
        return other

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> moments `[B, N, 2 C p p]`: means, then log variances, of each token."""
        return patchify(self.moments(images), self.patch_size)

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Moments `[B, N, 2 C p p]` -> scaled tokens `[B, N, C p p]`: posterior means, or samples if draws are given.

        The draws are normals called "posterior", of size (N, C p p).
        """
        mean, logvar = split_moments(compressed, dim=-1)
        if draws is not None:
            noise = draws.normal("posterior", tuple(mean.shape[1:]), dtype=mean.dtype)
            mean = mean + (0.5 * logvar).exp() * noise
        return self.scale * (mean - self.shift)

    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Scaled tokens `[B, N, C p p]` -> images `[B, 3, H, W]`, not clamped."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.spec.length, self.spec.size):
            raise ValueError(f"expected tokens [B, {self.spec.length}, {self.spec.size}] for {self.spec}, "
                             f"got {list(tokens.shape)}.")
        latents = unpatchify(tokens / self.scale + self.shift, self.patch_size, self.spec.grid)
        return self.decoder(self.post_quant_conv(latents))

    def moments(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> mean and log variance (not yet clamped) stacked, `[B, 2 C, h, w]`."""
        require_images(images, self.image_size)
        moments = self.quant_conv(self.encoder(images))
        return moments if self.variational else torch.cat([moments, torch.ones_like(moments)], dim=1)

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """Reconstructions of posterior samples; `kl_weight` times a sample's mean KL (`parts["kl"]`: unweighted)."""
        compressed = self.compress(images)
        reconstructions = self.decode(self.tokens(compressed, draws))
        kl = kl_divergence(*split_moments(compressed, dim=-1)).mean()
        return reconstructions, Losses(self.kl_weight * kl, {"kl": kl.detach()})

    def calibrate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Set the scale that gives the latents of training images unit deviation (arXiv 2112.10752, section G)."""
        self.scale = latent_statistics(self, batches).scale
        return {"scale": self.scale}

    def last_decoder_weight(self) -> Tensor:
        return self.decoder.conv_out.weight

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "mar", MAR's and latent diffusion's (files keep it under `model` or `state_dict`), and
        "diffusers", whose names are ours.
        """
        return {"mar": KeyMap([
            *latent_diffusion_rules(levels=len(self.encoder.down_blocks)),
            Rename("quant_conv.{p}", "quant_conv.{p}"),
            Rename("post_quant_conv.{p}", "post_quant_conv.{p}"),
            Ignore("loss.{rest*}"),  # the training loss's own weights, which latent diffusion's files carry along
        ]), "diffusers": KeyMap([Rename("{rest*}", "{rest*}")])}


def split_moments(moments: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Stacked moments -> mean and log variance, the latter clamped to the official [-30, 20]."""
    mean, logvar = moments.chunk(2, dim=dim)
    return mean, logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of diagonal Gaussians `[B, ...]` from N(0, 1), in nats, summed over each sample: `[B]`."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LatentStatistics:
    """How the latents of a data set are distributed, before shift and scale.

    Attributes:
        mean: of all latents.
        std: of all latents as sampled from the posterior.
        channel_mean: `[C]`, mean of each latent channel.
        channel_spread: `[C]`, standard deviation of each channel's posterior means. Near 0 the channel has collapsed:
            it carries noise and nothing of the image, and the KL weight was too large.
    """

    mean: float
    std: float
    channel_mean: Tensor
    channel_spread: Tensor

    @property
    def scale(self) -> float:
        """The `scale` that gives tokens unit standard deviation, 1 / std (0.2325 for MAR's VAE on ImageNet)."""
        return 1 / self.std


@torch.no_grad()
def latent_statistics(tokenizer: KLTokenizer, batches: Iterable[Tensor]) -> LatentStatistics:
    """Measure the latents of images `[B, 3, H, W]`, batch by batch.

    The variance of sampled latents is that of the means plus the mean posterior variance, so nothing is drawn. Sums are
    kept in float64.
    """
    sums, count = torch.zeros(()), 0
    for images in batches:
        mean, logvar = split_moments(tokenizer.moments(images).double(), dim=1)
        sums = sums.to(mean) + torch.stack([mean, mean.square(), logvar.exp()]).sum(dim=(1, 3, 4))
        count += mean[:, 0].numel()
    if not count:
        raise ValueError("latent_statistics was given no images.")
    mean, square, variance = sums / count
    spread = (square - mean.square()).clamp_min(0).sqrt()
    std = (square.mean() - mean.mean().square() + variance.mean()).sqrt()
    return LatentStatistics(mean.mean().item(), std.item(), mean.float(), spread.float())
