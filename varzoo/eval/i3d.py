"""I3D on RGB clips (arXiv 1705.07750), trained on Kinetics-400: the network of the Fréchet video distance.

The layout is that of piergiaj/pytorch-i3d, in which VideoGPT's `i3d_pretrained_400.pt` is published. Padding is
TensorFlow's "SAME": it depends on the size, and the odd pixel goes behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size3 = tuple[int, int, int]

# branches of the mixed blocks: 1x1; 1x1 then 3x3; 1x1 then 3x3; pool then 1x1
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)), "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)), "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)), "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)), "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def pad_same(x: Tensor, kernel: Size3, stride: Size3) -> Tensor:
    """Zeros around `[B, C, T, H, W]` so that a window gives ceil(size / stride) outputs."""
    pads: list[int] = []
    for size, width, step in reversed(list(zip(x.shape[2:], kernel, stride))):  # F.pad counts from the last axis
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit3D(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, inside: int, outside: int, kernel: Size3 = (1, 1, 1), stride: Size3 = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(inside, outside, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class MaxPoolSame(nn.Module):
    """Max-pooling over what is never negative, so that zeros are a neutral border."""

    def __init__(self, kernel: Size3, stride: Size3) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, inside: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = Unit3D(inside, widths[0])
        self.b1a, self.b1b = Unit3D(inside, widths[1]), Unit3D(widths[1], widths[2], (3, 3, 3))
        self.b2a, self.b2b = Unit3D(inside, widths[3]), Unit3D(widths[3], widths[4], (3, 3, 3))
        self.b3a, self.b3b = MaxPoolSame((3, 3, 3), (1, 1, 1)), Unit3D(inside, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x)))
        return torch.cat(branches, dim=1)


class Head(nn.Module):
    """The 1x1 convolution to class logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)


class I3D(nn.Module):
    """Clips `[B, 3, T, 224, 224]` in [-1, 1], T at least 9 -> class logits.

    Args:
        classes: number of classes.
    """

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, (7, 7, 7), (2, 2, 2))
        self.MaxPool3d_2a_3x3 = MaxPoolSame((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, (3, 3, 3))
        self.MaxPool3d_3a_3x3 = MaxPoolSame((1, 3, 3), (1, 2, 2))
        for name, (inside, widths) in MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPoolSame((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPoolSame((2, 2, 2), (2, 2, 2))
            setattr(self, name, Mixed(inside, widths))
        self.logits = Head(classes)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, classes]` and pooled features `[B, 1024]`, both averaged over time."""
        x = clips
        for name, layer in self.named_children():  # in the order of construction
            if name != "logits":
                x = layer(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits.conv3d(x).flatten(2).mean(-1), x.flatten(2).mean(-1)
