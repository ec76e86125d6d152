"""Fréchet video distance (arXiv 1812.01717) in the field's three variants, which differ in network file, resizing and
covariance: see `varzoo.eval.protocol` for which is whose."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from varzoo.core.checkpoint import load_strictly, read_weights
from varzoo.core.errors import unknown
from varzoo.core.weights import WeightsFile
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.i3d import I3D

TORCHSCRIPT = WeightsFile(file="i3d_torchscript.pt", sha256=None, url=None, purpose="FVD (StyleGAN-V, LARP, NAR, NBP)",
                          origin="StyleGAN-V's page")
PYTORCH = WeightsFile(file="i3d_pretrained_400.pt", sha256=None, url=None, purpose="FVD (VideoGPT, TATS)",
                      origin="VideoGPT's page")
SHORTEST = 9  # frames; fewer leave no window for the last pooling


def resize_short_side(clips: Tensor, side: int) -> Tensor:
    """Shorter side of `[..., H, W]` to `side`, bilinearly without antialiasing, then the square in the centre.

    StyleGAN-V's rule (NBP): the longer side becomes ceil(length * side / shorter).
    """
    shortest = min(clips.shape[-2:])
    size = tuple(side if length == shortest else math.ceil(length * side / shortest) for length in clips.shape[-2:])
    frames = clips.reshape(-1, 1, *clips.shape[-2:])
    frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = ((length - side) // 2 for length in size)
    return frames[..., top:top + side, left:left + side].reshape(*clips.shape[:-2], side, side)


def resize_stretched(clips: Tensor, side: int) -> Tensor:
    """`[..., H, W]` -> a square, bilinearly, the aspect not kept (VideoGPT)."""
    frames = clips.reshape(-1, 1, *clips.shape[-2:])
    frames = F.interpolate(frames, size=(side, side), mode="bilinear", align_corners=False)
    return frames.reshape(*clips.shape[:-2], side, side)


RESIZES = {"short_side": resize_short_side, "stretched": resize_stretched}


class VideoFeatures(FeatureExtractor):
    """The 400 logits of I3D for clips.

    Args:
        resize: "inside" (LARP and NAR: the TorchScript network resizes), "short_side" (StyleGAN-V, NBP) or "stretched"
            (VideoGPT).
        weights: the network's file: TorchScript for the first two, VideoGPT's state dict for "stretched"; None: looked
            for as `WeightsFile.find` says.
    """

    name, metric, dim, classes = "i3d", "FVD", 400, 400

    def __init__(self, *, resize: str, weights: str | Path | None = None) -> None:
        super().__init__()
        if resize not in ("inside", *RESIZES):
            raise unknown("resize", resize, ("inside", *RESIZES))
        self.resize = resize
        if resize == "stretched":
            path = PYTORCH.find(weights)
            self.network = I3D(classes=self.classes)
            load_strictly(self.network, read_weights(path), str(path))
        else:
            path = TORCHSCRIPT.find(weights)
            try:
                self.network = torch.jit.load(path, map_location="cpu")
            except RuntimeError as error:
                raise ValueError(f"{path} is not a TorchScript network ({error}).") from error
        self.eval().requires_grad_(False)

    def check(self, images: Tensor) -> None:
        floating = images.dtype == torch.float32
        if images.ndim != 5 or images.shape[2] != 3 or not (floating or images.dtype == torch.uint8):
            raise ValueError("clips are uint8, or float32 in [0, 1], of shape [B, T, 3, H, W]; got "
                             f"{images.dtype} {tuple(images.shape)}.")
        if images.shape[1] < SHORTEST:
            raise ValueError(f"I3D needs clips of at least {SHORTEST} frames, got {images.shape[1]}.")

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        clips = images if images.dtype == torch.float32 else images.float() / 255
        clips = (2 * clips - 1).transpose(1, 2)  # [B, 3, T, H, W]
        if self.resize != "inside":
            clips = RESIZES[self.resize](clips, 224)
        if isinstance(self.network, I3D):
            logits = self.network(clips)[0]
        else:
            logits = self.network(clips, rescale=False, resize=self.resize == "inside", return_features=True)
        return {"features": logits, "logits": logits}
