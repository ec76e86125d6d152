"""Binary autoencoder: every latent vector becomes bits, without a codebook to search (ELM, arXiv 2410.16257).

Official code: Pepper-lll/LMforImageGeneration, after binary latent diffusion (arXiv 2304.04820). The bits of a position
are packed into T ids of D bits each, the first channel being the most significant bit. As in the official code:
- no nonlinearity stands between the last norm and the last convolution, of encoder and decoder alike;
- bit 0 contributes nothing to the decoded vector, bit 1 a learned vector;
- the penalty of undecided bits applies a sigmoid to what are probabilities already.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.conv_autoencoder import (
    binary_autoencoder_rules,
    build_decoder,
    build_encoder,
    downsampling,
    image_and_grid,
    require_images,
)
from varzoo.tokenizers.base import UINT8_RULES, Tokenizer


class BinaryTokenizer(Tokenizer):
    """Bits by thresholds, or by Bernoulli draws.

    Args:
        image_size: one side or (height, width) in pixels.
        width: channels of a level with multiplier 1, a multiple of 32.
        multipliers: widths by level, full resolution first.
        blocks_per_level: ResNet blocks of an encoder level.
        decoder_blocks_per_level: of a decoder level.
        attention_levels: levels that attend, 0 at full resolution.
        channels: of the latent maps on either side of the bits.
        bits: per position.
        groups: ids T per position; they share the bits equally.
        input_norm: whether the decoder begins with a norm, as the published ones do.
        deterministic: whether training takes the likelier bits, instead of drawing them.
        undecided: weight of the penalty of undecided bits (official 0).
        uint8_rule: how decoded images are rounded.

    What is cached are the probabilities `[B, N, bits]`: training a generator with `posterior` draws bits anew at every
    step, as the official training does with all but the "deter" files.
    """

    goldens: ClassVar[tuple[str, ...]] = ("elm/b*",)

    def __init__(self, *, image_size: int | Sequence[int], width: int, multipliers: Sequence[int],
                 blocks_per_level: int, decoder_blocks_per_level: int, attention_levels: Collection[int],
                 channels: int, bits: int, groups: int, input_norm: bool, deterministic: bool, undecided: float,
                 uint8_rule: str) -> None:
        super().__init__()
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        if groups < 1 or bits < 1 or bits % groups:
            raise ValueError(f"{bits} bits do not split into {groups} groups: choose a divisor of {bits}.")
        self.image_size, grid = image_and_grid(image_size, downsampling(multipliers))
        self.spec = TokenSpec(kind="discrete", shape=grid, size=2 ** (bits // groups), depth=groups)
        self.uint8_rule, self.deterministic, self.undecided = uint8_rule, deterministic, undecided
        self.layout: dict[str, Any] = {"multipliers": multipliers, "blocks_per_level": blocks_per_level,
                       "decoder_blocks_per_level": decoder_blocks_per_level, "attention_levels": attention_levels,
                       "input_norm": input_norm}
        self.encoder = build_encoder(width=width, multipliers=multipliers, blocks_per_level=blocks_per_level,
                                     attention_levels=attention_levels, out_channels=channels)
        self.to_bits = nn.Conv2d(channels, bits, 1)
        self.bit_vectors = nn.Parameter(torch.randn(bits, channels))
        self.input_norm = nn.GroupNorm(32, channels, eps=1e-6) if input_norm else nn.Identity()
        self.decoder = build_decoder(width=width, multipliers=multipliers, in_channels=channels,
                                     blocks_per_level=decoder_blocks_per_level - 1, attention_levels=attention_levels)
        for part in (self.encoder, self.decoder):
            part.conv_act = nn.Identity()  # type: ignore[assignment]  # the official one has none before its last layer

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> probabilities of bits, `[B, N, bits]`."""
        require_images(images, self.image_size)
        return rearrange(self.to_bits(self.encoder((images + 1) / 2)), "b c h w -> b (h w) c").sigmoid()

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Probabilities -> ids, of the likelier bits, or of Bernoulli draws."""
        return pack_bits(self._bits(compressed, draws), self.spec.depth)

    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids `[B, N, T]` (`[B, N]` with one group) -> images `[B, 3, H, W]`, not clamped."""
        expected = (self.spec.length, self.spec.depth)[:1 + (self.spec.depth > 1)]
        if tokens.shape[1:] != expected:
            raise ValueError(f"expected ids [B, {', '.join(map(str, expected))}] for {self.spec}, got "
                             f"{list(tokens.shape)}.")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.spec.size):
            raise ValueError(f"ids must lie in 0 to {self.spec.size - 1}; got {int(tokens.min())} to "
                             f"{int(tokens.max())}.")
        return self._paint(unpack_bits(tokens, self.spec.depth, len(self.bit_vectors)).to(self.bit_vectors.dtype))

    def vectors(self, bits: Tensor) -> Tensor:
        """Bits `[B, N, bits]` -> the decoder's input, `[B, C, h, w]`."""
        h, w = self.spec.shape
        return rearrange(bits @ self.bit_vectors, "b (h w) c -> b c h w", h=h, w=w)

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """Reconstructions, straight-through, and the penalty of undecided bits; "ones" is the share of bits set."""
        probabilities = self.compress(images)
        bits = self._bits(probabilities, None if self.deterministic else draws).to(probabilities.dtype)
        squashed = probabilities.sigmoid()
        penalty = self.undecided * (squashed * (1 - squashed)).mean()
        reconstructions = self._paint(probabilities + (bits - probabilities).detach())
        return reconstructions, Losses(penalty, {"undecided": penalty.detach(), "ones": bits.mean()})

    def last_decoder_weight(self) -> Tensor:
        return self.decoder.conv_out.weight

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "elm", whose unused parts (`logsigma`, idle shortcuts) are left out."""
        return {"elm": KeyMap([
            *binary_autoencoder_rules(**self.layout), Rename("quantize.proj.0.{p}", "to_bits.{p}"),
            Rename("quantize.embed.weight", "bit_vectors"), Ignore("generator.logsigma.{rest*}"),
        ], prefixes=("ae.",))}

    def _bits(self, probabilities: Tensor, draws: AnyDraws | None) -> Tensor:
        if draws is None:
            return probabilities > 0.5
        return draws.uniform("bits", tuple(probabilities.shape[1:])) < probabilities

    def _paint(self, bits: Tensor) -> Tensor:
        return 2 * self.decoder(self.input_norm(self.vectors(bits))) - 1


def pack_bits(bits: Tensor, groups: int) -> Tensor:
    """Bits `[B, N, groups D]` -> ids `[B, N, groups]`, or `[B, N]` for one group; first bit most significant."""
    grouped = bits.long().unflatten(-1, (groups, -1))
    places = 2 ** torch.arange(grouped.shape[-1] - 1, -1, -1, device=bits.device)
    ids = (grouped * places).sum(dim=-1)
    return ids[..., 0] if groups == 1 else ids


def unpack_bits(ids: Tensor, groups: int, bits: int) -> Tensor:
    """The inverse of `pack_bits`: bits `[B, N, bits]`."""
    grouped = ids[..., None] if groups == 1 else ids
    places = torch.arange(bits // groups - 1, -1, -1, device=ids.device)
    return (grouped[..., None] >> places & 1).flatten(-2)
