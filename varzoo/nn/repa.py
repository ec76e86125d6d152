"""REPA (arXiv 2410.06940): a generator's inner features are aligned with those of a pretrained vision transformer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.checkpoint import load_strictly, read_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]


@dataclass(frozen=True)
class Target:
    """Patch features of a frozen vision transformer of timm, DINOv2 by default.

    The network is read when it is first asked, so a trained model is loaded without it.

    Args:
        model: timm's name.
        weights: its file in timm's layout; None: looked for as MODEL.safetensors in the folder $VARZOO_WEIGHTS, then in
            the hub's cache. Nothing is downloaded.
        image_size: images are resized to this side.
    """

    model: str = "vit_large_patch14_dinov2.lvd142m"
    weights: str | None = None
    image_size: int = 518

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> normed patch features `[B, C, h, w]`."""
        network = self._network.to(images.device)
        images = F.interpolate((images.float() + 1) / 2, size=(self.image_size, self.image_size), mode="bicubic",
                               antialias=True, align_corners=False)
        mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (MEAN, STD))
        tokens = network.forward_features((images - mean) / std)[:, network.num_prefix_tokens:]
        return tokens.transpose(1, 2).unflatten(2, network.patch_embed.grid_size)

    @cached_property
    def _network(self) -> Any:
        """Raises FileNotFoundError where the weights are missing, saying where to put them and how to do without."""
        path = self._find()
        network: Any = timm.create_model(self.model, pretrained=False, num_classes=0, img_size=self.image_size)
        load_strictly(network, checkpoint_filter_fn(read_weights(path), network), str(path))  # resizes positions
        return network.eval().requires_grad_(False)

    def _find(self) -> Path:
        file = f"{self.model}.safetensors"
        places = [Path(self.weights)] if self.weights else []
        if not places and os.environ.get("VARZOO_WEIGHTS"):
            places.append(Path(os.environ["VARZOO_WEIGHTS"]) / file)
        if not self.weights and isinstance(cached := try_to_load_from_cache(f"timm/{self.model}", "model.safetensors"),
                                           str):
            places.append(Path(cached))
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            looked = ", ".join(map(str, places)) or "the hub's cache"
            raise FileNotFoundError(
                f"REPA needs the weights of {self.model}, which are not at {looked}. Download model.safetensors of "
                f"timm/{self.model} from the Hugging Face hub, save it as {file} in the folder that $VARZOO_WEIGHTS "
                "names, or give its path as repa.target.weights; repa=null trains without.")
        return found


class REPA(nn.Module):
    """A head on a generator's features and its distance from a pretrained network's.

    Args:
        target: whose features.
        layer: index of the block after which the features are taken.
        width: of the features.
        hidden: width of the head's two hidden layers.
        channels: of the target's features.
        grid: side of the grid on which the two are compared; both are resized to it.
        weight: of the loss.
    """

    def __init__(self, *, target: Target, layer: int, width: int, hidden: int, channels: int, grid: int,
                 weight: float) -> None:
        super().__init__()
        self.target, self.layer, self.grid, self.weight = target, layer, grid, weight
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                  nn.Linear(hidden, channels))

    def forward(self, features: Tensor, patches: tuple[int, int], images: Tensor) -> Tensor:
        """1 - cosine similarity, averaged, of features `[B, h w, width]` on (h, w) patches and those of the images."""
        maps = features.transpose(1, 2).unflatten(2, patches)
        ours = self.head(to_grid(maps, self.grid).flatten(2).transpose(1, 2))
        theirs = to_grid(self.target.features(images), self.grid).flatten(2).transpose(1, 2)
        return 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean()


def to_grid(maps: Tensor, side: int) -> Tensor:
    """Maps `[B, C, h, w]` -> `[B, C, side, side]`: averaged over squares where they fit, else bilinearly."""
    if maps.shape[-2] % side == 0 and maps.shape[-1] % side == 0:
        return F.adaptive_avg_pool2d(maps, side)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
