"""Scoring a set of samples: Fréchet distance, inception score and class accuracy in one streaming pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.data.datasets import LabelledImages
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.inception_score import InceptionScore, shuffled_splits
from varzoo.eval.moments import Gaussian, Moments, SampleSet, frechet_distance
from varzoo.eval.protocol import EvalProtocol
from varzoo.tokenizers.base import to_uint8


@dataclass(frozen=True)
class Samples:
    """A batch of samples.

    Attributes:
        images: uint8 `[B, 3, H, W]`.
        labels: the classes asked for, int64 `[B]`; None if there were none.
        indices: global sample indices, int64 `[B]`; None for samples that come in order.
    """

    images: Tensor
    labels: Tensor | None = None
    indices: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of a set of samples.

    Attributes:
        fd: Fréchet distance of the extractor's features to the reference; its name is the protocol's `metric`.
        inception_score: mean over the splits, of the extractor's logits.
        inception_score_std: its standard deviation over the splits.
        accuracy: share of samples that the extractor classifies as asked for, in [0, 1]; None without labels.
        count: number of samples.
    """

    fd: float
    inception_score: float
    inception_score_std: float
    accuracy: float | None
    count: int


class Scorer:
    """Accumulates the scores of one set of samples. Each process scores its own samples, then all call `all_reduce`.

    Args:
        extractor: on the device where it is to run.
        count: number of samples in the whole set; a sample index beyond it is padding.
        splits: splits of the inception score (torch-fidelity's seeded shuffle).
    """

    def __init__(self, *, extractor: FeatureExtractor, count: int, splits: int = 10) -> None:
        self.extractor, self.count = extractor, count
        self.samples = SampleSet(count)
        self.device = next(extractor.parameters()).device
        self.moments = Moments(dim=extractor.dim, count=count, device=self.device)
        self.inception = InceptionScore(classes=extractor.classes, assignment=shuffled_splits(count, splits=splits),
                                        device=self.device)
        self.labelled = torch.zeros(2, dtype=torch.int64, device=self.device)  # right, all

    def update(self, samples: Samples) -> None:
        """Add a batch; samples counted before and padding are left out."""
        indices = self.samples.next_indices(len(samples.images)) if samples.indices is None else samples.indices.cpu()
        fresh = self.samples.fresh(indices)
        if not fresh.any():
            return
        output = self.extractor(samples.images[fresh.to(samples.images.device)].to(self.device))
        self.moments.update(output["features"], indices[fresh])
        self.inception.update(output["logits"], indices[fresh])
        if samples.labels is not None:
            labels = samples.labels[fresh.to(samples.labels.device)].to(self.device)
            right = output["logits"].argmax(-1) == labels
            self.labelled += torch.stack([right.sum(), torch.tensor(len(right), device=self.device)])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace this process's sums by those of all processes."""
        self.samples.all_reduce(group, self.device)
        self.moments.all_reduce(group)
        self.inception.all_reduce(group)
        dist.all_reduce(self.labelled, group=group)

    def scores(self, reference: Gaussian) -> Scores:
        """The scores. Raises ValueError unless exactly `count` samples have come."""
        if len(self.samples) != self.count:
            raise ValueError(f"the protocol asks for {self.count} samples, {len(self.samples)} came; draw the others "
                             "(sampling goes on where it stopped) or score fewer.")
        mean, std = self.inception.result()
        right, labelled = self.labelled.tolist()
        accuracy = right / labelled if labelled == self.count else None
        return Scores(frechet_distance(self.moments.gaussian(), reference), mean, std, accuracy, self.count)

    def state_dict(self) -> dict[str, object]:
        return {"moments": self.moments.state_dict(), "inception": self.inception.state_dict(),
                "labelled": self.labelled.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.moments.load_state_dict(state["moments"])
        self.inception.load_state_dict(state["inception"])
        self.samples.seen = self.moments.samples.seen.clone()
        self.labelled.copy_(state["labelled"])


def score(batches: Iterable[Samples], *, count: int, reference: Gaussian, extractor: FeatureExtractor,
          splits: int = 10) -> Scores:
    """Score `count` samples in one process (see `Scorer` for several).

    Args:
        batches: the samples.
        count: how many there must be.
        reference: statistics of the reference by the same extractor (`reference_statistics`, or `Gaussian.from_npz`).
        extractor: on the device where it is to run.
        splits: splits of the inception score.
    """
    scorer = Scorer(extractor=extractor, count=count, splits=splits)
    for samples in batches:
        scorer.update(samples)
    return scorer.scores(reference)


def dataset_samples(dataset: LabelledImages, *, batch_size: int = 100) -> Iterator[Samples]:
    """The images of a data set as samples, in order."""
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([to_uint8(dataset[index]["image"]) for index in indices])
        yield Samples(images, dataset.labels[indices.start:indices.stop], torch.tensor(indices))


def reference_statistics(batches: Iterable[Samples], *, extractor: FeatureExtractor) -> Gaussian:
    """Mean and covariance of the features of reference images, such as `dataset_samples(dataset)`."""
    device = next(extractor.parameters()).device
    moments = Moments(dim=extractor.dim, device=device)
    for samples in batches:
        moments.update(extractor(samples.images.to(device))["features"], samples.indices)
    return moments.gaussian()


def make_protocol(*, extractor: FeatureExtractor, count: int, reference: Gaussian, reference_name: str, labels: str,
                  uint8_rule: str, splits: int = 10) -> EvalProtocol:
    """The protocol of `score` with these arguments."""
    statistics = torch.cat([reference.mean, reference.covariance.flatten()]).numpy().round(6)
    return EvalProtocol(
        metric=extractor.metric, extractor=extractor.name, extractor_hash=extractor.weights_hash(), count=count,
        labels=labels, uint8_rule=uint8_rule, reference=reference_name, is_splits=splits,
        reference_hash=hashlib.sha256(statistics.tobytes()).hexdigest()[:12])
