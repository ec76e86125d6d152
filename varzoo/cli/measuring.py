"""What scoring commands are made of: extractors by name, references by name or file, a pass that survives a kill."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varzoo.cli.options import Options
from varzoo.cli.processes import Processes
from varzoo.core.checkpoint import atomic_path
from varzoo.core.errors import unknown
from varzoo.data.datasets import Digits, FashionMNIST, LabelledImages
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import ClassifierFeatures, FeatureExtractor
from varzoo.eval.inception import InceptionFeatures
from varzoo.eval.pretrained import DinoFeatures, MobileNetFeatures
from varzoo.eval.protocol import REFERENCE_TYPES, EvalProtocol
from varzoo.eval.readers import SampleReader
from varzoo.eval.references import Reference
from varzoo.eval.score import Samples, dataset_samples, reference_statistics
from varzoo.eval.video import VideoFeatures

DATASETS: dict[str, Callable[..., LabelledImages]] = {"digits": Digits, "fashion_mnist": FashionMNIST}
PRETRAINED = {"mobilenet": MobileNetFeatures, "dinov2": DinoFeatures}
EXTRACTORS = (*ClassifierFeatures.RECIPES, *PRETRAINED, "inception")
SAVE_EVERY = 20  # batches
KEPT = ("features", "reference")  # .npy files of a pass


def make_extractor(options: Options, asked: EvalProtocol | None) -> FeatureExtractor:
    """The extractor that is named, or the protocol's own."""
    name, download = options.get("extractor"), options.flag("download")
    if asked is not None and name is None:
        assert asked.extractor_resize is not None, "a protocol that knows its extractor knows how that resizes"
        if asked.frames:
            return VideoFeatures(resize=asked.extractor_resize, weights=options.get("weights"))
        extractor = InceptionFeatures(weights=options.get("weights"), download=download, resize=asked.extractor_resize)
        if extractor.published and asked.metric == "rFID":
            extractor.metric = asked.metric
        return extractor
    if name == "inception":
        return InceptionFeatures(weights=options.get("weights"), download=download)
    if name in PRETRAINED:
        return PRETRAINED[name](weights=options.get("weights"), download=download)
    if name not in EXTRACTORS:
        raise unknown("extractor", name, EXTRACTORS)
    if options.get("weights"):
        raise ValueError(f"weights= is an option of extractors with published weights; {name} trains its own "
                         "classifier.")
    return ClassifierFeatures(dataset=name, root=options.get("root"))


def dataset_by_name(name: str, root: str | None, **settings: Any) -> LabelledImages | None:
    """digits, digits_train, ...: held-out or training images; None where the name is no data set's."""
    split = "train" if name.endswith("_train") else "heldout"
    make = DATASETS.get(name.removesuffix("_train"))
    if make is None:
        return None
    return make(split=split, **settings) if make is Digits else make(split=split, root=root, **settings)


@dataclass(frozen=True)
class Images:
    """Images of a data set or of files, as batches.

    Attributes:
        name: in words.
        count: how many there are.
        batches: rank, world size -> this process's share.
        kind: type of a reference made of them.
    """

    name: str
    count: int
    batches: Callable[[int, int], Iterator[Samples]]
    kind: str

    @classmethod
    def find(cls, options: Options, name: str, kind: str | None) -> Images:
        """By name or path. Raises ValueError where there is neither."""
        size = options.whole("batch_size")
        dataset = dataset_by_name(name, options.get("root"))
        if dataset is not None:
            own = "train" if dataset.split == "train" else "validation"
            if kind not in (None, own):
                raise ValueError(f"{name} are images of type {own!r}, not {kind!r}; leave reference_type out.")
            return cls(f"{len(dataset)} images of {dataset.name} {dataset.split}", len(dataset),
                       lambda rank, world: dataset_samples(dataset, batch_size=size, rank=rank, world_size=world), own)
        if not Path(name).exists():
            raise ValueError(f"unknown reference or data {name!r}: it is neither digits, digits_train, fashion_mnist "
                             "or fashion_mnist_train, nor a file or folder.")
        if kind is not None and kind not in REFERENCE_TYPES:
            raise unknown("reference type", kind, REFERENCE_TYPES)
        reader = SampleReader(path=name, batch_size=size)
        clips = "clips" if reader.frames else "images"
        return cls(f"{len(reader)} {clips} of {Path(name).name}", len(reader),
                   lambda rank, world: share(reader, rank, world), kind or clips)


def share(reader: SampleReader, rank: int, world_size: int) -> Iterator[Samples]:
    """Every so-manieth batch of the files."""
    return reader.batches(lambda indices: int(indices[0]) // reader.batch_size % world_size == rank)


@dataclass(frozen=True)
class ReferenceSource:
    """A reference before it is read: what it is, and how to get it."""

    name: str
    kind: str
    get: Callable[[FeatureExtractor, bool, bool], Reference]  # extractor, with features, biased covariance


def find_reference(options: Options, processes: Processes, folder: Path) -> ReferenceSource:
    """The reference that is named. Features of many images are kept in `folder`."""
    path, kind = Path(options["reference"]), options.get("reference_type")
    if path.suffix == ".npz" and path.is_file() and has_statistics(path):
        stored = Reference.read(path, kind)

        def read(extractor: FeatureExtractor, features: bool, _: bool) -> Reference:
            stored.check(extractor)
            if not features or stored.features is not None or not has_images(path):
                return stored
            images = Images.find(options, str(path), kind)  # ADM's files hold images for precision and recall
            return replace(stored, features=measured(images, extractor, processes, folder, features=True).features)

        return ReferenceSource(stored.name, stored.kind, read)
    images = Images.find(options, options["reference"], kind)
    return ReferenceSource(images.name, images.kind, lambda extractor, features, biased: measured(
        images, extractor, processes, folder, features=features, biased=biased))


def measured(images: Images, extractor: FeatureExtractor, processes: Processes, folder: Path, *, features: bool,
             biased: bool = False) -> Reference:
    """Statistics of images, the work shared among processes."""
    path = folder / f"reference_{processes.rank}.npy"
    bank = FeatureBank(dim=extractor.dim, count=images.count, path=path) if features else None
    return reference_statistics(images.batches(processes.rank, processes.world_size), extractor=extractor,
                                name=images.name, kind=images.kind, biased=biased, bank=bank,
                                distributed=processes.many)


def has_statistics(path: Path) -> bool:
    return "mu" in stored_names(path)


def has_images(path: Path) -> bool:
    return "arr_0" in stored_names(path)


def stored_names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file.files
    except Exception as error:  # whatever a damaged archive raises
        raise ValueError(f"{path} is no .npz file: {error}.") from error


class Pass:
    """One pass over samples that can be killed and taken up again.

    Args:
        folder: where it is kept; None: nowhere, it cannot be taken up.
        identity: of what is scored; another pass's folder is refused.
        processes: this process's place; taking up needs as many.
    """

    def __init__(self, *, folder: str | None, identity: str, processes: Processes) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="varzoo-eval-")
        self.folder = Path(self._temporary.name if self._temporary else folder or "")
        self.keeps, self.identity = folder is not None, identity
        self.path = self.folder / f"{processes.rank}_of_{processes.world_size}.pt"

    def load(self, parts: dict[str, Any]) -> None:
        """Put accumulators into the state that was kept, if there is one."""
        others = [path for path in self.folder.glob("*_of_*.pt") if path.name.split("_of_")[1] !=
                  self.path.name.split("_of_")[1]]
        if others:
            raise ValueError(f"{self.folder} keeps a pass of another number of processes ({others[0].name}); use as "
                             "many, or delete it.")
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        if state["identity"] != self.identity:
            raise ValueError(f"{self.folder} keeps the pass over other samples or another protocol; choose another "
                             "state=, or delete it.")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def run(self, batches: Iterable[tuple[Any, ...]], parts: dict[str, Any], update: Callable[..., None]) -> None:
        """Give every batch to `update`, keeping the state of the accumulators now and then."""
        for number, batch in enumerate(batches, 1):
            update(*batch)
            if number % SAVE_EVERY == 0:
                self.save(parts)
        self.save(parts)

    def save(self, parts: dict[str, Any]) -> None:
        """Keep the state of all accumulators, in one step."""
        if self.keeps:
            with atomic_path(self.path) as temporary:
                torch.save({"identity": self.identity, **{name: part.state_dict() for name, part in parts.items()}},
                           temporary)

    def finish(self) -> None:
        """Nothing need be kept any more."""
        if self._temporary:
            self._temporary.cleanup()
            return
        for path in (self.path, *(self.folder / f"{name}_{self.path.name.split('_')[0]}.npy" for name in KEPT)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process's files, or the user's
            self.folder.rmdir()
