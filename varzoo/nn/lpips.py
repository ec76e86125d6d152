"""LPIPS v0.1, the learned perceptual distance (arXiv 1801.03924), on VGG-16 or AlexNet features.

Both images go through a frozen classifier; at five of its layers the features are scaled to unit length, and the
squared differences are weighted per channel by a learned head and averaged over the map. torchvision has the backbones,
and torchmetrics' wheel ships the heads. torchmetrics' own distance is not used: it guards the unit length with 1e-8
inside the root instead of 1e-10 outside, and so differs from the published one where features are small.

Deviation: LlamaGen's training switches the dropout in front of the heads on (by calling `train()` on its whole loss);
here there is none, as in every published distance.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, WeightsEnum, alexnet, vgg16

from varzoo.core.checkpoint import load_strictly, read_weights
from varzoo.core.errors import unknown
from varzoo.core.keymap import Alias, Ignore, KeyMap, Rename, Rule
from varzoo.core.weights import WeightsFile

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Backbone:
    """A torchvision classifier whose `features` are tapped.

    Attributes:
        build: the torchvision constructor.
        weights: the weights that the heads were trained for.
        taps: index in `features` of the five ReLUs after which features are compared.
        channels: their widths.
        smallest: least height and width in pixels that leave every tapped map non-empty.
    """

    build: Callable[..., Any]
    weights: WeightsEnum
    taps: Sequence[int]
    channels: Sequence[int]
    smallest: int

    @property
    def file(self) -> str:
        return self.weights.url.rsplit("/", 1)[-1]

    def features(self) -> nn.Sequential:
        """The layers up to the last tap. The classifier, nine tenths of the parameters, is never allocated."""
        with torch.device("meta"):
            layers: nn.Sequential = self.build(weights=None).features[: self.taps[-1] + 1]
        layers.to_empty(device=torch.get_default_device())
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        return layers


BACKBONES = {
    "vgg": Backbone(vgg16, VGG16_Weights.IMAGENET1K_V1, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "alex": Backbone(alexnet, AlexNet_Weights.IMAGENET1K_V1, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
}


class LPIPS(nn.Module):
    """The distance, frozen. Random until weights are loaded: use `LPIPS.pretrained`.

    Args:
        net: "vgg" (the usual training loss) or "alex" (the usual metric).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise unknown("LPIPS backbone", net, BACKBONES)
        self.net = net
        self.backbone = BACKBONES[net].features()
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in BACKBONES[net].channels)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def pretrained(cls, net: str, backbone: str | Path | None = None, heads: str | Path | None = None) -> LPIPS:
        """The published distance. Nothing is downloaded.

        Args:
            net: "vgg" or "alex".
            backbone: torchvision's weight file; None: looked for by torchvision's file name in the folder
                $VARZOO_WEIGHTS, then in torch hub's cache.
            heads: the linear heads; None: those in the installed torchmetrics.

        Raises:
            FileNotFoundError: a file is absent; the message says which, where to put it and how to do without.
        """
        model = cls(net)
        backbone = _find_backbone(net) if backbone is None else Path(backbone)
        heads = _shipped_heads(net) if heads is None else Path(heads)
        for path in (backbone, heads):
            if not path.is_file():
                raise FileNotFoundError(f"no LPIPS weights at {path}. {_advice(net)}")
        state = _torchvision_key_map().to_ours(read_weights(backbone))
        state |= KeyMap(_head_rules(prefix="")).to_ours(read_weights(heads))
        load_strictly(model, state, f"{backbone} with {heads}")
        return model

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance `[B]` of images `[B, 3, H, W]` in [-1, 1]."""
        return self.per_layer(a, b).sum(dim=1)

    def per_layer(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance's five terms, `[B, 5]`, the shallowest layer first."""
        smallest = BACKBONES[self.net].smallest
        if min(*a.shape[-2:], *b.shape[-2:]) < smallest:
            raise ValueError(f"LPIPS on {self.net} needs images of at least {smallest} x {smallest} pixels, got "
                             f"{list(a.shape)}; enlarge them, or set the perceptual weight to 0.")
        # One pass each: of an original that needs no gradient, no activations are kept.
        pairs = zip(self.heads, self._features(a), self._features(b))
        return torch.stack([head((x - y).square()).mean(dim=(1, 2, 3)) for head, x, y in pairs], dim=1)

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "lpips", the lpips package's; "llamagen", inside LlamaGen's VQ loss."""
        return {
            "lpips": KeyMap([*_rules(self.net, prefix=""),
                             Alias("lins.{k}.model.1.weight", of="lin{k}.model.1.weight")]),
            "llamagen": KeyMap(_rules(self.net, prefix="perceptual_loss.")),
        }

    def _features(self, images: Tensor) -> list[Tensor]:
        x, features = (images - self.shift) / self.scale, []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in BACKBONES[self.net].taps:
                features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return features


def _rules(net: str, prefix: str) -> list[Rule]:
    taps = BACKBONES[net].taps
    layers = range(taps[-1] + 1)
    slices = {layer: next(k for k, tap in enumerate(taps, 1) if layer <= tap) for layer in layers}
    constants = {"shift": torch.tensor(SHIFT).reshape(1, 3, 1, 1), "scale": torch.tensor(SCALE).reshape(1, 3, 1, 1)}
    return [
        *(Rename(f"{prefix}net.slice{k}.{layer}.{{p}}", f"backbone.{layer}.{{p}}") for layer, k in slices.items()),
        *_head_rules(prefix),
        *(Ignore(f"{prefix}scaling_layer.{name}", constant=value.clone) for name, value in constants.items()),
    ]


def _head_rules(prefix: str) -> list[Rule]:
    return [Rename(f"{prefix}lin{{k}}.model.1.weight", "heads.{k}.weight")]


def _torchvision_key_map() -> KeyMap:
    return KeyMap([Rename("features.{i}.{p}", "backbone.{i}.{p}"), Ignore("classifier.{rest*}")])


def _places(net: str) -> list[Path]:
    """Where a backbone is looked for, in order."""
    weights = BACKBONES[net].weights
    return WeightsFile(file=BACKBONES[net].file, sha256=None, url=weights.url, purpose="LPIPS",
                       origin="torchvision").places()


def _find_backbone(net: str) -> Path:
    places = _places(net)
    return next((path for path in places if path.is_file()), places[0])


def _shipped_heads(net: str) -> Path:
    package = Path(importlib.util.find_spec("torchmetrics").origin).parent  # type: ignore[union-attr, arg-type]
    return package / "functional" / "image" / "lpips_models" / f"{net}.pth"


def _advice(net: str) -> str:
    return (f"Download {BACKBONES[net].weights.url} into the folder that $VARZOO_WEIGHTS names (or to "
            f"{_places(net)[-1]}), or give its path as `backbone`; the heads come with torchmetrics. To train without "
            "LPIPS, set the perceptual weight to 0.")
