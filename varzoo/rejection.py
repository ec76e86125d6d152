"""Rejection sampling by a classifier: of several candidates for every image, the one that shows its class best.

Used since VQ-VAE-2 (arXiv 1906.00446, 3.5); RQ-Transformer reports results that keep 5 % by a ResNet-101 (arXiv
2203.01941). That code was not released: here the candidates of an image are consecutive samples, so that image i
depends on nothing but seed and i, and the kept images are some of those that sampling without rejection draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varzoo.eval.features import FeatureExtractor


class Rejection:
    """Keeps a fraction of all candidates, the best of every 1 / keep.

    Args:
        classifier: gives logits of the classes.
        keep: the fraction, one over a whole number.
    """

    def __init__(self, *, classifier: FeatureExtractor, keep: float) -> None:
        self.candidates = round(1 / keep) if 0 < keep <= 1 else 0
        if not self.candidates or abs(self.candidates * keep - 1) > 1e-6:
            raise ValueError(f"the fraction to keep must be one over a whole number, such as 0.05, got {keep:g}.")
        self.classifier = classifier

    def of(self, index: int) -> range:
        """Sample indices of the candidates for image `index`."""
        return range(index * self.candidates, (index + 1) * self.candidates)

    def check(self, labels: Sequence[int] | None) -> None:
        """Raise ValueError unless there are labels and the classifier knows them."""
        if labels is None:
            raise ValueError("rejection sampling keeps what shows its class best: it needs labels, and this model has "
                             "none. Leave rejection out.")
        if max(labels, default=0) >= self.classifier.classes:
            raise ValueError(f"the classifier {self.classifier.name} knows classes 0 to {self.classifier.classes - 1}, "
                             f"but class {max(labels)} was asked for: choose another.")

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """log p(label | image), `[B]`, of uint8 images `[B, 3, H, W]`."""
        self.classifier.to(images.device)
        return self.classifier(images)["logits"].log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]

    def best(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of candidates, image by image, `[B candidates, 3, H, W]`, the best of each, the first among equals."""
        scores = self.scores(images, labels).unflatten(0, (-1, self.candidates))
        groups = images.unflatten(0, scores.shape)
        return groups[torch.arange(len(groups), device=images.device), scores.argmax(dim=1)]
