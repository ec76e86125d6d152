"""Scoring a set of samples in one streaming pass: Fréchet distances, inception score, precision and recall, kernel
distance and class accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.core.errors import unknown
from varzoo.data.datasets import LabelledImages
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.inception_score import InceptionScore, consecutive_splits, shuffled_splits
from varzoo.eval.kernel_distance import kernel_distance, subset_indices
from varzoo.eval.manifold import precision_recall
from varzoo.eval.moments import Moments, SampleSet, frechet_distance
from varzoo.eval.protocol import EvalProtocol
from varzoo.eval.references import Reference
from varzoo.tokenizers.base import to_uint8

METRICS = ("fd", "sfd", "inception_score", "precision_recall", "kid")
IS_FORMULAS = {"shuffled": lambda count, splits: shuffled_splits(count, splits=splits),
               "consecutive": lambda count, _: consecutive_splits(count)}


@dataclass(frozen=True)
class Samples:
    """A batch of samples.

    Attributes:
        images: uint8 `[B, 3, H, W]`; or clips `[B, T, 3, H, W]`, uint8 or float32 in [0, 1].
        labels: the classes asked for, int64 `[B]`; None if there were none.
        indices: global sample indices, int64 `[B]`; None for samples that come in order.
    """

    images: Tensor
    labels: Tensor | None = None
    indices: Tensor | None = None

    @property
    def numbers(self) -> Tensor:
        """The indices, of samples that have been given some."""
        assert self.indices is not None
        return self.indices


@dataclass(frozen=True)
class Scores:
    """Scores of a set of samples; None where one was not asked for.

    Attributes:
        fd: Fréchet distance of the extractor's features to the reference; its name is the protocol's `metric`.
        inception_score: mean over the splits, of the extractor's logits.
        inception_score_std: its standard deviation over the splits.
        accuracy: share of samples that the extractor classifies as asked for, in [0, 1]; None without labels.
        count: number of samples.
        sfd: Fréchet distance of spatial features; called sFID where `fd` is called FID.
        precision, recall: in [0, 1].
        kid, kid_std: kernel distance over subsets, mean and standard deviation.
    """

    fd: float
    inception_score: float | None
    inception_score_std: float | None
    accuracy: float | None
    count: int
    sfd: float | None = None
    precision: float | None = None
    recall: float | None = None
    kid: float | None = None
    kid_std: float | None = None


class Scorer:
    """Accumulates the scores of one set of samples. Each process scores its own samples, then all call `all_reduce`.

    Args:
        extractor: on the device where it is to run.
        count: number of samples in the whole set; a sample index beyond it is padding.
        splits: splits of the inception score.
        is_formula: which sample is in which split: "shuffled" (torch-fidelity) or "consecutive" (ADM's 5000).
        metrics: of `METRICS`.
        biased: divide the covariance by n (LARP's FVD) instead of n - 1.
        half: take manifold distances in float16, as ADM.
        features: a .npy file that keeps the features, where precision, recall or KID need them; None: in memory. Each
            process needs its own.
        kid_subsets, kid_size: number and size of KID's subsets.
    """

    def __init__(self, *, extractor: FeatureExtractor, count: int, splits: int = 10, is_formula: str = "shuffled",
                 metrics: Collection[str] = ("fd", "inception_score"), biased: bool = False, half: bool = False,
                 features: str | Path | None = None, kid_subsets: int = 100, kid_size: int = 1000) -> None:
        for name in metrics:
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
        if is_formula not in IS_FORMULAS:
            raise unknown("formula of the inception score", is_formula, IS_FORMULAS)
        if "sfd" in metrics and extractor.spatial_dim is None:
            raise ValueError(f"the extractor {extractor.name} has no spatial features; sfd is Inception's.")
        self.extractor, self.count, self.metrics = extractor, count, frozenset(metrics)
        self.biased, self.half, self.kid_subsets, self.kid_size = biased, half, kid_subsets, kid_size
        self.device = extractor.device
        self.samples = SampleSet(count)
        self.labelled = torch.zeros(2, dtype=torch.int64, device=self.device)  # right, all
        settings: dict[str, Any] = {"count": count, "device": self.device}
        self.moments = Moments(dim=extractor.dim, **settings)
        self.spatial = None
        if "sfd" in metrics and extractor.spatial_dim is not None:
            self.spatial = Moments(dim=extractor.spatial_dim, **settings)
        self.inception = InceptionScore(classes=extractor.classes, assignment=IS_FORMULAS[is_formula](count, splits),
                                        device=self.device) if "inception_score" in metrics else None
        keeps = self.metrics & {"precision_recall", "kid"}
        self.bank = FeatureBank(dim=extractor.dim, count=count, path=features) if keeps else None

    @property
    def parts(self) -> dict[str, Any]:
        """The accumulators by name."""
        parts = {"moments": self.moments, "spatial": self.spatial, "inception": self.inception, "bank": self.bank}
        return {name: part for name, part in parts.items() if part is not None}

    def update(self, samples: Samples) -> None:
        """Add a batch; samples counted before and padding are left out."""
        indices = self.samples.next_indices(len(samples.images)) if samples.indices is None else samples.indices.cpu()
        fresh = self.samples.fresh(indices)
        if not fresh.any():
            return
        output = self.extractor(samples.images[fresh.to(samples.images.device)].to(self.device))
        self.add(output, indices[fresh])
        if samples.labels is not None:
            labels = samples.labels[fresh.to(samples.labels.device)].to(self.device)
            right = output["logits"].argmax(-1) == labels
            self.labelled += torch.stack([right.sum(), torch.tensor(len(right), device=self.device)])

    def add(self, output: dict[str, Tensor], indices: Tensor) -> None:
        """Add what the extractor gave for samples that were not counted before."""
        self.moments.update(output["features"], indices)
        if self.spatial is not None:
            self.spatial.update(output["spatial"], indices)
        if self.inception is not None:
            self.inception.update(output["logits"], indices)
        if self.bank is not None:
            self.bank.update(output["features"], indices)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace this process's sums by those of all processes."""
        self.samples.all_reduce(group, self.device)
        for part in self.parts.values():
            part.all_reduce(group)
        dist.all_reduce(self.labelled, group=group)

    def scores(self, reference: Reference, *, distributed: bool = False) -> Scores:
        """The scores. Where `distributed`, all processes call this after `all_reduce` and share the work.

        Raises:
            ValueError: not exactly `count` samples have come, or the reference is another extractor's or incomplete.
        """
        if len(self.samples) != self.count:
            raise ValueError(f"the protocol asks for {self.count} samples, {len(self.samples)} came; draw the others "
                             "(sampling goes on where it stopped) or score fewer.")
        reference.check(self.extractor)
        self._require(reference)
        mean, std = (None, None) if self.inception is None else self.inception.result()
        right, labelled = self.labelled.tolist()
        values: dict[str, float] = {}
        if self.spatial is not None and reference.spatial is not None:
            values["sfd"] = frechet_distance(self.spatial.gaussian(biased=self.biased), reference.spatial)
        own, theirs = None if self.bank is None else self.bank.features, reference.features
        if "precision_recall" in self.metrics and own is not None and theirs is not None:
            values["precision"], values["recall"] = precision_recall(
                own, theirs, half=self.half, distributed=distributed)
        if "kid" in self.metrics and own is not None and theirs is not None:
            rows = subset_indices(self.count, len(theirs), subsets=self.kid_subsets, size=self.kid_size)
            values["kid"], values["kid_std"] = kernel_distance(own, theirs, rows)
        distance = frechet_distance(self.moments.gaussian(biased=self.biased), reference.gaussian)
        return Scores(distance, mean, std, right / labelled if labelled == self.count else None, self.count, **values)

    def _require(self, reference: Reference) -> None:
        if reference.covariance != ("biased" if self.biased else "unbiased"):
            raise ValueError(f"the reference {reference.name} has a covariance that is {reference.covariance}, the "
                             "protocol's is the other; build it under the same protocol.")
        if self.spatial is not None and reference.spatial is None:
            raise ValueError(f"the reference {reference.name} has no statistics of spatial features, which sfd needs; "
                             "build it with them (reference=build).")
        if self.bank is not None and reference.features is None:
            raise ValueError(f"the reference {reference.name} has no features, which precision, recall and KID need; "
                             "give images, or build it with features=true.")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.samples.seen.clone(), "labelled": self.labelled.clone(),
                **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples.seen = state["seen"].clone()
        self.labelled.copy_(state["labelled"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def score(batches: Iterable[Samples], *, count: int, reference: Reference, extractor: FeatureExtractor,
          **settings: Any) -> Scores:
    """Score `count` samples in one process (see `Scorer` for several, and for more settings).

    Args:
        batches: the samples.
        count: how many there must be.
        reference: statistics of the reference by the same extractor (`reference_statistics`, or `Reference.read`).
        extractor: on the device where it is to run.
        settings: see `Scorer`.
    """
    scorer = Scorer(extractor=extractor, count=count, **settings)
    for samples in batches:
        scorer.update(samples)
    return scorer.scores(reference)


def dataset_samples(dataset: LabelledImages, *, batch_size: int = 100, rank: int = 0,
                    world_size: int = 1) -> Iterator[Samples]:
    """The images of a data set as samples, in order; of several processes, each gets every so-manieth batch."""
    for start in range(rank * batch_size, len(dataset), world_size * batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([to_uint8(dataset[index]["image"]) for index in indices])
        yield Samples(images, dataset.labels[indices.start:indices.stop], torch.tensor(indices))


def reference_statistics(batches: Iterable[Samples], *, extractor: FeatureExtractor, name: str = "images",
                         kind: str = "images", biased: bool = False, bank: FeatureBank | None = None,
                         distributed: bool = False) -> Reference:
    """Statistics of reference images.

    Args:
        batches: such as `dataset_samples(dataset)`; in several processes, each its own.
        extractor: on the device where it is to run.
        name, kind: see `Reference`.
        biased: divide the covariance by n instead of n - 1.
        bank: keeps all features, for precision, recall and KID.
        distributed: every process calls this, and gets the whole.
    """
    device = extractor.device
    moments = Moments(dim=extractor.dim, device=device)
    spatial = None if extractor.spatial_dim is None else Moments(dim=extractor.spatial_dim, device=device)
    for samples in batches:
        output = extractor(samples.images.to(device))
        index = moments.samples.next_indices(len(samples.images)) if samples.indices is None else samples.indices
        moments.update(output["features"], index)
        if spatial is not None:
            spatial.update(output["spatial"], index)
        if bank is not None:
            bank.update(output["features"], index)
    if distributed:
        for part in (moments, spatial, bank):
            if part is not None:
                part.all_reduce()
    return Reference(
        gaussian=moments.gaussian(biased=biased), name=name, kind=kind, count=len(moments),
        spatial=None if spatial is None else spatial.gaussian(biased=biased),
        features=None if bank is None else bank.features, extractor=(extractor.name, extractor.weights_hash()),
        covariance="biased" if biased else "unbiased")


def make_protocol(*, extractor: FeatureExtractor, count: int, reference: Reference, labels: str, uint8_rule: str,
                  splits: int = 10, **fields: Any) -> EvalProtocol:
    """The protocol of `score` with these arguments; other fields of a protocol may be given too."""
    return EvalProtocol(
        metric=extractor.metric, extractor=extractor.name, extractor_hash=extractor.weights_hash(), count=count,
        labels=labels, uint8_rule=uint8_rule, reference=reference.name, is_splits=splits,
        reference_hash=reference.hash, reference_type=reference.kind, covariance=reference.covariance,
        extractor_resize=extractor.resize, **fields)
