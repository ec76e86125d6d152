"""PatchGAN: a discriminator that judges overlapping patches (arXiv 1611.07004, section 3.2.2), and adversarial losses.

The network and its initialisation are VQGAN's (arXiv 2012.09841), as LlamaGen trains its tokenizers with.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """4x4 convolutions: `depth` of stride 2, then two of stride 1; BatchNorm between, LeakyReLU(0.2).

    Keep it in train mode, as the official training does: BatchNorm then normalises each forward by its own batch.

    Args:
        width: channels after the first convolution; they double with every layer, up to 8 times.
        depth: convolutions of stride 2 (official 3).
    """

    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * min(2**layer, 8) for layer in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            layers += [
                nn.Conv2d(before, after, 4, stride=2 if layer < depth else 1, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest = 3 * 2**depth  # leaves a 3 x 3 map for the two last layers, each of which takes one pixel
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> one logit per patch `[B, 1, h, w]`, positive for real."""
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(f"this PatchGAN needs images of at least {self.smallest} x {self.smallest} pixels, got "
                             f"{list(images.shape)}; use a smaller depth.")
        return self.main(images)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Pushes logits of real images above 1 and of fake ones below -1 (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def swapped_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """LlamaGen's "non-saturating" loss, whose cross-entropy takes targets for logits and logits for targets.

    Kept to reproduce runs that used it: fakes get no gradient, reals an unbounded one. Never choose it for a new run.
    """
    return 0.5 * (_swapped(real, 1.0) + _swapped(fake, 0.0))


def hinge_generator(fake: Tensor) -> Tensor:
    """Raises the logits of fake images."""
    return -fake.mean()


def vanilla_generator(fake: Tensor) -> Tensor:
    """The non-saturating counterpart of `vanilla_discriminator` (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake).mean()


def swapped_generator(fake: Tensor) -> Tensor:
    """See `swapped_discriminator`; its gradient is that of `hinge_generator`."""
    return _swapped(fake, 1.0)


def _swapped(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(torch.full_like(logits, target), logits)


DISCRIMINATOR_LOSSES = {
    # name: (logits of real images, logits of fake ones) -> scalar
    "hinge": hinge_discriminator,
    "vanilla": vanilla_discriminator,
    "swapped": swapped_discriminator,
}
GENERATOR_LOSSES = {
    # name: logits of fake images -> scalar
    "hinge": hinge_generator,
    "vanilla": vanilla_generator,
    "swapped": swapped_generator,
}
