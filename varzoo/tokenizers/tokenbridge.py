"""TokenBridge (arXiv 2503.16430): the latents of a trained VAE as ids, every channel of every token by itself.

    image --VAE--> latents [B, N, C] --GaussianQuantizer--> ids [B, N, C] --its table--> latents --VAE--> image

Nothing is learned, so a checkpoint is the VAE's. A cache stores what the VAE's does, the moments of a posterior:
latents may be drawn anew before they are quantised, as officially. Official code: YuqingWang1029/TokenBridge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.gaussian_quantizer import GaussianQuantizer
from varzoo.tokenizers.base import Tokenizer


class TokenBridgeTokenizer(Tokenizer):
    """A quantiser on the scaled latents of a frozen VAE.

    Args:
        vae: any tokenizer of continuous tokens, of about unit variance.
        quantizer: the range and the levels.

    Tokens are ids `[B, N, C]`; `spec.depth` is C, `spec.size` the number of levels. Latents outside of the range are
    clamped, as officially; `quantization_statistics` counts them.
    """

    goldens: ClassVar[tuple[str, ...]] = ("tokenbridge/quantizer*",)

    def __init__(self, *, vae: Tokenizer, quantizer: GaussianQuantizer) -> None:
        super().__init__()
        if vae.spec.kind != "continuous":
            raise ValueError(f"TokenBridge quantises continuous tokens, but its VAE makes {vae.spec}. Choose a "
                             "tokenizer without a codebook, such as kl16.")
        self.vae, self.quantizer = vae.requires_grad_(False), quantizer
        self.image_size, self.uint8_rule = vae.image_size, vae.uint8_rule
        self.spec = TokenSpec(kind="discrete", shape=vae.spec.shape, size=quantizer.levels, depth=vae.spec.size)

    @property
    def beneath(self) -> Tokenizer:
        return self.vae

    def at_size(self, image_size: int | Sequence[int]) -> TokenBridgeTokenizer:
        other, vae = copy(self), self.vae.at_size(image_size)
        other._modules = {**self._modules, "vae": vae}  # shallow: a table of modules of its own, the same modules
        other.image_size, other.spec = vae.image_size, replace(self.spec, shape=vae.spec.shape)
        return other

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> what the VAE gives: moments `[B, N, 2C]`."""
        return self.vae.compress(images)

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Moments `[B, N, 2C]` -> ids `[B, N, C]` of posterior means, or of samples if draws are given."""
        return self.quantizer.ids(self.vae.tokens(compressed, draws))

    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids `[B, N, C]` -> images `[B, 3, H, W]`, not clamped."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.spec.length, self.spec.depth) or tokens.is_floating_point():
            raise ValueError(f"expected ids [B, {self.spec.length}, {self.spec.depth}] for {self.spec}, got "
                             f"{list(tokens.shape)} of {tokens.dtype}.")
        return self.vae.decode(self.quantizer.values(tokens), draws)

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """Raises ValueError: there is nothing to train."""
        raise ValueError("TokenBridge has nothing to train: train its VAE, as in experiment=digits_kl, and give that "
                         "as tokenizer_checkpoint.")

    def key_maps(self) -> dict[str, KeyMap]:
        """The VAE's layouts, the last of them its own file here ("vae")."""
        layouts = self.vae.key_maps() | {"vae": KeyMap([Rename("{name*}", "{name*}")])}
        return {name: key_map.within("vae") for name, key_map in layouts.items()}

    def codebook(self) -> Tensor:
        """What each level stands for, `[levels, 1]`, in every channel."""
        return self.quantizer.table[:, None]


@dataclass(frozen=True)
class QuantizationStatistics:
    """What quantisation does to the latents of a data set.

    Attributes:
        count: numbers quantised.
        outside: how many of them were outside of the range and clamped.
        error: mean squared difference of numbers and what their ids stand for.
        channel_levels: `[C]` how many levels of each channel occur.
    """

    count: int
    outside: int
    error: float
    channel_levels: Tensor


@torch.no_grad()
def quantization_statistics(tokenizer: TokenBridgeTokenizer, batches: Iterable[Tensor]) -> QuantizationStatistics:
    """Measure the quantisation of the posterior means of images `[B, 3, H, W]`, batch by batch."""
    spec, quantizer = tokenizer.spec, tokenizer.quantizer
    count, outside, error = 0, 0, 0.0
    occurs = torch.zeros(spec.depth, spec.size, dtype=torch.bool, device=quantizer.table.device)
    for images in batches:
        latents = tokenizer.vae.encode(images)
        ids = quantizer.ids(latents)
        count += latents.numel()
        outside += int(quantizer.outside(latents).sum())
        error += (quantizer.values(ids) - latents).double().square().sum().item()
        for channel, row in enumerate(ids.flatten(0, 1).unbind(1)):
            occurs[channel, row] = True
    if not count:
        raise ValueError("quantization_statistics was given no images.")
    return QuantizationStatistics(count, outside, error / count, occurs.sum(dim=1))
