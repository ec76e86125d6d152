"""The contract of tokenizers: pixels <-> tokens.

A tokenizer owns its pixel range, its latent scale and shift, and its rule from float images to uint8; nothing else in
varzoo knows such a number. Encoding is split in two, so that the slow half can be cached: `compress` is deterministic
and ends in what a cache stores (ids, or the moments of a posterior), `tokens` turns that into tokens, drawing if asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec

UINT8_RULES = {
    # name: float images in [-1, 1] -> values in [0, 255] before the cast, which truncates
    "round": lambda images: ((images + 1) / 2 * 255).clamp(0, 255).round(),  # half to even (MAR family)
    "half_up": lambda images: (127.5 * images + 128).clamp(0, 255),  # LlamaGen family
    "truncate": lambda images: ((images + 1) / 2).clamp(0, 1) * 255,  # RAR, TiTok
}


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Turn float images in [-1, 1] (clamped) into uint8 of the same shape, by one of the field's three rules."""
    if rule not in UINT8_RULES:
        raise unknown("uint8 rule", rule, UINT8_RULES)
    return UINT8_RULES[rule](images.float()).to(torch.uint8)


class Stream(ABC):
    """The state of one batch of images being decoded while their tokens are drawn."""

    @abstractmethod
    def push(self, tokens: Tensor) -> int:
        """Take the next tokens `[B, n]` of the sequences; returns how many decoding steps they allowed."""

    @abstractmethod
    def preview(self) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, as far as they are known; after the last token what `decode` gives."""


class Tokenizer(nn.Module, ABC):
    """Base of all tokenizers.

    Attributes:
        spec: what its tokens look like at `image_size`.
        image_size: (height, width) in pixels of the images that `spec` speaks of.
        uint8_rule: how `to_uint8` rounds.
        shortest_prefix: where any prefix decodes, the fewest tokens that do.
        options: names of the keyword arguments that `decode` takes besides tokens and draws, such as solver steps.
        goldens: shell patterns of the cases in tests/goldens that hold it to the official code.
        needs_objective: whether training compares reconstructions with originals; else its own losses are all.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    needs_objective: ClassVar[bool] = True
    goldens: ClassVar[tuple[str, ...]] = ()

    spec: TokenSpec
    image_size: tuple[int, int]
    uint8_rule: str = "round"
    shortest_prefix: int = 1

    @abstractmethod
    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> what a cache stores: ids, latents or posterior moments `[B, N, ...]`."""

    @abstractmethod
    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """What `compress` gave -> tokens, as the spec says (scaled). Without draws: the deterministic choice."""

    def extras(self, compressed: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """What a generator may learn from beside drawn tokens, by name, such as soft targets. By default nothing."""
        return {}

    def encode(self, images: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> tokens; drawn from the posterior if there is one and draws are given."""
        return self.tokens(self.compress(images), draws)

    @abstractmethod
    def decode(self, tokens: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Tokens -> images `[B, 3, H, W]`, nominally in [-1, 1], not clamped.

        A decoder that draws needs draws, one row per sample; others ignore them. Where `spec.prefix_decodes`, tokens
        may be the first k of each sequence, `[B, k]`, or a sequence of B prefixes `[k_i]`.
        """

    def stream(self, draws: AnyDraws, **options: Any) -> Stream:
        """A decoding that takes tokens as they come, one image per row of draws; options as in `decode`.

        Raises:
            ValueError: this tokenizer decodes only what is complete.
        """
        raise ValueError(f"{type(self).__name__} paints no previews while tokens are drawn: its decoder needs them "
                         "all. Leave previews out, or choose a tokenizer that streams, such as D-AR's.")

    def at_size(self, image_size: int | Sequence[int]) -> Tokenizer:
        """This tokenizer, with the same weights, for images of another size (one side or (height, width)).

        Raises:
            ValueError: the weights fit one size alone, or not this one.
        """
        raise ValueError(f"{type(self).__name__} takes images of {self.image_size} alone, not of {image_size}.")

    def to_uint8(self, images: Tensor) -> Tensor:
        """Decoded images -> uint8 `[B, 3, H, W]` by this tokenizer's rule."""
        return to_uint8(images, self.uint8_rule)

    @property
    def beneath(self) -> Tokenizer | None:
        """The frozen tokenizer whose tokens this one works on (a VAE), None for those that work on pixels."""
        return None

    @classmethod
    def settings_of(cls, path: Path) -> tuple[dict[str, Any], list[str]]:
        """What an official file says of its own configuration: constructor arguments as in a config, and remarks.

        Raises:
            ValueError: it says what this tokenizer does not compute.
        """
        return {}, []

    @abstractmethod
    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor | None, Losses]:
        """One training pass: reconstructions `[B, 3, H, W]` and the losses of the bottleneck (VQ, commitment, KL).

        Reconstructions are None unless `needs_objective`.

        What compares reconstruction and original (L1 or L2, LPIPS, adversarial) belongs to the training objective, not
        to the tokenizer; `parts` may carry statistics such as codebook usage and perplexity.
        """

    def calibrate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Constructor arguments to be measured on training images after training, such as the latent scale.

        They are set on this tokenizer too. `batches` are images `[B, 3, H, W]` in [-1, 1]; by default nothing is
        measured.
        """
        return {}

    @abstractmethod
    def key_maps(self) -> dict[str, KeyMap]:
        """Official checkpoint layouts by name."""

    def last_decoder_weight(self) -> Tensor:
        """The weight of the last decoder layer, against whose gradients an adaptive adversarial weight is measured."""
        raise AttributeError(f"{type(self).__name__} offers no last decoder layer; turn the adaptive weight off.")

    def codebook(self) -> Tensor:
        """The code vectors `[K, C]` as decoded, or `[D, K, C]` where every level of a code has its own.

        Generators that embed codes use them.

        Raises:
            ValueError: the tokens stand for no learned vectors.
        """
        raise ValueError(f"{type(self).__name__} has no codebook, which this generator embeds its codes with: choose a "
                         "tokenizer that has one, such as vq16 or rq_f32.")

    def stored_codebook(self) -> Tensor:
        """The code vectors as stored, which may not be normalised yet: LANTERN's neighbours are theirs."""
        return self.codebook()
