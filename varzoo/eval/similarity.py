"""How close a reconstruction is to its original: PSNR and SSIM (Wang et al. 2004), per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varzoo.core.errors import unknown

WINDOWS = ("uniform", "gaussian")


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """10 log10 (1 / mean squared error) of each image `[B]`, for `[B, ...]` in [0, 1]; infinite for equal ones."""
    error = (reconstructions.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(reconstructions: Tensor, originals: Tensor, *, window: str = "uniform", data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image, `[B]`, for `[B, C, H, W]` in [0, 1].

    Args:
        window: "uniform", 7 x 7 with the sample covariance (scikit-image's default, LlamaGen's); or "gaussian", 11 x 11
            of sigma 1.5 with the population covariance (the paper's).
        data_range: of the values. LlamaGen's script says 2, although its images lie in [0, 1], which raises the result.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if window not in WINDOWS:
        raise unknown("SSIM window", window, WINDOWS)
    side = 7 if window == "uniform" else 11
    if min(originals.shape[-2:]) < side:
        raise ValueError(f"SSIM looks through a window of {side} x {side}, larger than the images "
                         f"{list(originals.shape)}.")
    weights = torch.ones(side, dtype=torch.float64)
    if window == "gaussian":
        weights = torch.exp(-0.5 * ((torch.arange(side, dtype=torch.float64) - side // 2) / 1.5).square())
    weights = (weights / weights.sum()).to(originals.device)
    correction = side**2 / (side**2 - 1) if window == "uniform" else 1.0
    x, y = (images.double().flatten(0, 1)[:, None] for images in (reconstructions, originals))

    def mean(values: Tensor) -> Tensor:  # over the windows that fit
        return F.conv2d(F.conv2d(values, weights[None, None, :, None]), weights[None, None, None, :])

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = (correction * (mean(values * values) - average * average)
                              for values, average in ((x, mean_x), (y, mean_y)))
    covariance = correction * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    map_ = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            / ((mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)))
    return map_.flatten(1).mean(1).unflatten(0, originals.shape[:2]).mean(1)
