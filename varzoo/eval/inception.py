"""Inception-v3 of 2015-12-05, the network of FID, sFID and the inception score (arXiv 1706.08500, 1606.03498).

The layers and the converted weights are torch-fidelity's. Its forward pass is spelled out here because it is asked for
what torch-fidelity's own does not give: sFID's spatial features, and the half-pixel resize of pytorch-fid.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from varzoo.core.checkpoint import read_weights
from varzoo.core.errors import unknown
from varzoo.core.weights import WeightsFile
from varzoo.eval.features import FeatureExtractor

WEIGHTS = WeightsFile(
    file="weights-inception-2015-12-05-6726825d.pth", sha256="6726825d", url=URL_INCEPTION_V3, purpose="FID",
    origin="torch-fidelity's release page")

LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
          "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
          "Mixed_7b", "Mixed_7c", "AvgPool")
SPATIAL_CHANNELS = 7  # of Mixed_6d's 1x1 branch, at 17 x 17 places: ADM's 2023 spatial features


def resize_like_tf1(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i samples row i h / H, without half-pixel offset or antialiasing."""
    return interpolate_bilinear_2d_like_tensorflow1x(images, size=size, align_corners=False)


def _tf1(images: Tensor) -> Tensor:
    return (resize_like_tf1(images, (299, 299)) - 128) / 128


def _half_pixel(images: Tensor) -> Tensor:
    return 2 * F.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1


RESIZES = {
    "tf1": _tf1,                # ADM's graph, torch-fidelity
    "half_pixel": _half_pixel,  # pytorch-fid; torchmetrics too where it enlarges
}


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features, 2023 spatial features and 1008 bias-free logits.

    Args:
        weights: file of the weights; None: looked for as `WeightsFile.find` says.
        download: fetch the published file (91 MB) if it is nowhere.
        resize: how images become 299 x 299: "tf1" (ADM, torch-fidelity) or "half_pixel" (pytorch-fid).
    """

    name, dim, classes = "inception", 2048, 1008
    spatial_dim = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, *, weights: str | Path | None = None, download: bool = False, resize: str = "tf1") -> None:
        super().__init__()
        if resize not in RESIZES:
            raise unknown("resize", resize, RESIZES)
        self.resize = resize
        path = WEIGHTS.find(weights, download)
        self.published = WEIGHTS.is_published(path)
        self.metric = "FID" if self.published else "fd_inception"  # a FID is by the published weights alone
        # torch-fidelity would unpickle anything; ours refuses code and hands on tensors only.
        safe = io.BytesIO()
        torch.save(read_weights(path), safe)
        safe.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
        self.eval().requires_grad_(False)

    def weights_hash(self) -> str:
        return WEIGHTS.sha256 if self.published and WEIGHTS.sha256 else super().weights_hash()

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        output = self.activations(images)
        features = output["AvgPool"].flatten(1)
        spatial = output["spatial"].permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "spatial": spatial, "logits": features @ self.network.fc.weight.T}

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        """What the layers after which features are read give: MaxPool_1, MaxPool_2, Mixed_6e, AvgPool; and "spatial",
        the first seven channels of Mixed_6d's 1x1 branch `[B, 7, 17, 17]`."""
        x, output = RESIZES[self.resize](images.float()), {}
        for name in LAYERS:
            if name == "Mixed_6d":  # the branch is run twice, so that no hook need keep anything: 1 % of the pass
                output["spatial"] = self.network.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
            x = getattr(self.network, name)(x)
            if name in ("MaxPool_1", "MaxPool_2", "Mixed_6e", "AvgPool"):
                output[name] = x
        return output
