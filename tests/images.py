"""Images for tests about evaluation, uint8 `[count, 3, H, W]`, a function of the seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def toy_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, seed: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) ** (1 + seed)
    return (255 * nn.functional.interpolate(coarse, size=(20, 28), mode="bilinear")).to(torch.uint8)
