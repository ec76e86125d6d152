"""Feature extractors: what a Fréchet distance, an inception score and a class accuracy are measured with.

Inception's distance is called FID. A distance by any other extractor is called fd_NAME and is never comparable with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet101
from torchvision.transforms.functional import normalize

from varzoo.core.checkpoint import load_strictly, read_weights, save_weights, weights_hash
from varzoo.core.draws import Draws
from varzoo.core.errors import unknown
from varzoo.data.datasets import Digits, FashionMNIST, LabelledImages
from varzoo.data.sampler import StepBatchSampler
from varzoo.tokenizers.base import to_uint8


class FeatureExtractor(nn.Module, ABC):
    """Images -> features and class logits, always in float32 without TF32.

    Attributes:
        name: names the extractor in protocols.
        metric: what the Fréchet distance of its features is called.
        dim: number of features D.
        classes: number of classes C of its logits.
        resize: how it makes images its own size, in a protocol's words.
        spatial_dim: number of spatial features S, None if it has none.
    """

    name: str
    metric: str
    dim: int
    classes: int
    resize: str = "none"
    spatial_dim: int | None = None

    @abstractmethod
    def extract(self, images: Tensor) -> dict[str, Tensor]: ...

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images `[B, 3, H, W]` -> `dict(features [B, D], logits [B, C])`, with `spatial [B, S]` if there are."""
        self.check(images)
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            return self.extract(images)

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless these are images that features can be taken of."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"features are taken of uint8 images [B, 3, H, W], got {images.dtype} "
                             f"{tuple(images.shape)}; turn floats into uint8 by the tokenizer's own rule.")

    def weights_hash(self) -> str:
        """Identity of the extractor's weights; of a published file, the first digits of its sha256."""
        return weights_hash(self.state_dict())


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside: it moves features by about 1e-3, and a FID with them."""
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
                         allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


class Classifier(nn.Module):
    """A small convolutional classifier of grey images with 64 penultimate features.

    Args:
        image_size: (height, width), multiples of 4.
        classes: number of classes.
        width: channels of the first stage.
    """

    DIM = 64

    def __init__(self, *, image_size: tuple[int, int], classes: int, width: int = 16) -> None:
        super().__init__()

        def stage(inside: int, outside: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

        self.trunk = nn.Sequential(
            *stage(1, width), *stage(width, width), nn.MaxPool2d(2),
            *stage(width, 2 * width), *stage(2 * width, 2 * width), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(2 * width * (image_size[0] // 4) * (image_size[1] // 4), self.DIM), nn.ReLU())
        self.head = nn.Linear(self.DIM, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images `[B, 3, H, W]` -> features `[B, 64]` and logits `[B, classes]`."""
        features = self.trunk(images.float().mean(1, keepdim=True) / 127.5 - 1)
        return features, self.head(features)


class ClassifierFeatures(FeatureExtractor):
    """Features of a `Classifier` trained on the train split of a small data set, at its default image size.

    It is trained on first use (digits: some seconds; Fashion-MNIST: some minutes) and kept in a cache folder under a
    hash of its recipe. Its distance is called fd_digits or fd_fashion_mnist.

    Args:
        dataset: "digits" or "fashion_mnist".
        root: where Fashion-MNIST lies, if not where Debian puts it.
        cache_dir: where trained classifiers are kept; `$VARZOO_CACHE`, else ~/.cache/varzoo.
        seed: seed of initialisation, batches and shifts.
    """

    # steps of `batch` images with random shifts of up to `shift` pixels, AdamW under a one-cycle learning rate
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"image_size": [16, 16], "steps": 300, "batch": 64, "lr": 4e-3, "shift": 1},
        "fashion_mnist": {"image_size": [32, 32], "steps": 1500, "batch": 64, "lr": 4e-3, "shift": 2},
    }

    def __init__(self, *, dataset: str = "digits", root: str | Path | None = None, cache_dir: str | Path | None = None,
                 seed: int = 0) -> None:
        super().__init__()
        if dataset not in self.RECIPES:
            raise unknown("classifier data set", dataset, self.RECIPES)
        self.name, self.metric, self.dim, self.classes = dataset, f"fd_{dataset}", Classifier.DIM, 10
        self.recipe = {"dataset": dataset, "seed": seed, "version": 1, **self.RECIPES[dataset]}
        self.image_size = tuple(self.recipe["image_size"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = Classifier(image_size=self.image_size, classes=self.classes)
        key = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:12]
        path = cache_folder(cache_dir) / f"classifier-{dataset}-{key}.safetensors"
        if path.is_file():
            load_strictly(self.classifier, read_weights(path), str(path))
        else:
            train = Digits() if dataset == "digits" else FashionMNIST(root=root)
            train_classifier(self.classifier, train, self.recipe)
            save_weights(path, self.classifier.state_dict(), self.recipe)
        self.eval().requires_grad_(False)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[2:] != self.image_size:
            raise ValueError(f"the {self.name} classifier looks at images of {self.image_size}, got "
                             f"{tuple(images.shape[2:])}.")
        features, logits = self.classifier(images)
        return {"features": features, "logits": logits}


def train_classifier(classifier: Classifier, dataset: LabelledImages, recipe: dict) -> None:
    """Train in place, on the CPU in a few seconds or minutes; the same seed gives the same weights on one machine."""
    images = torch.stack([to_uint8(dataset[index]["image"]) for index in range(len(dataset))])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe["lr"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=recipe["steps"])
    batches = StepBatchSampler(length=len(dataset), batch_size=recipe["batch"], seed=recipe["seed"])
    classifier.train()
    for step in range(recipe["steps"]):
        rows = [example.index for example in batches.batch_at(step)]
        draws = Draws(recipe["seed"], tuple(rows)).keyed(iteration=step)
        _, logits = classifier(_shifted(images[rows], recipe["shift"], draws))
        loss = F.cross_entropy(logits, dataset.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _shifted(images: Tensor, most: int, draws: Draws) -> Tensor:
    """Each image moved by up to `most` pixels, its border repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (most,) * 4, mode="replicate")
    offsets = draws.integers("shift", 2 * most + 1, (2,)).tolist()
    return torch.stack([image[:, top:top + height, left:left + width] for image, (top, left) in zip(padded, offsets)])


def cache_folder(given: str | Path | None) -> Path:
    """Where derived files are kept: the given folder, else `$VARZOO_CACHE`, else ~/.cache/varzoo."""
    return Path(given or os.environ.get("VARZOO_CACHE") or Path.home() / ".cache" / "varzoo")


class ResNetFeatures(FeatureExtractor):
    """torchvision's ResNet-101 of ImageNet: 2048 features, 1000 classes in the order of their wnids.

    Images are resized to 224 x 224 (bilinear, antialiased) and normalised as in its training.

    Args:
        weights: file of the weights, as torchvision publishes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not given, or is no ResNet-101.
    """

    name, metric, dim, classes = "resnet101", "fd_resnet101", 2048, 1000
    SIDE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, *, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None:
            raise ValueError("the ResNet-101 needs its weights: give the file that torchvision publishes "
                             "(resnet101-*.pth), as in rejection.classifier.weights=FILE.")
        self.network = resnet101()
        load_strictly(self.network, read_weights(weights), str(weights))
        self.head, self.network.fc = self.network.fc, nn.Identity()
        self.eval().requires_grad_(False)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        resized = F.interpolate(images.float() / 255, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        features = self.network(normalize(resized, self.MEAN, self.STD))
        return {"features": features, "logits": self.head(features)}
