"""Labelled images: handwritten digits, Fashion-MNIST, folders of one's own, ImageNet.

Every data set is a map from a key to `dict(image, label, index)`: image float32 `[3, H, W]` in [-1, 1], label and
index int64. The key is an index or an `Example(index, iteration)`, and the item a pure function of it: augmentation is
looked up in the data set's draws, never consumed. A plain index means iteration 0.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from varzoo.core.draws import Draws
from varzoo.core.errors import unknown
from varzoo.data.sampler import Example
from varzoo.data.transforms import Size, Transform, Views, make_transform

log = logging.getLogger(__name__)


class LabelledImages(Dataset, ABC):
    """Base of all data sets.

    Attributes:
        name: the data set's name in manifests and tables.
        split: which part of it.
        class_names: one name per class; a class is its position in this list.
        labels: the class of every image, int64 `[len(self)]`.
        image_size: (height, width) of the items.
        transform: how a picture becomes an item.
        seed: seed of the augmentation.
    """

    name: str
    splits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, split: str, image_size: int | tuple[int, int], augmentation: str | Transform,
                 seed: int) -> None:
        if self.splits and split not in self.splits:
            raise unknown(f"split of {self.name}", split, self.splits)
        self.split = split
        self.transform = make_transform(augmentation, image_size)
        self.seed = seed
        self.class_names: tuple[str, ...]
        self.labels: Tensor

    @property
    def image_size(self) -> Size:
        return self.transform.image_size

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """The original picture, RGB, of whatever size it has."""

    def __getitem__(self, key: int | Example) -> dict[str, Any]:
        index, iteration = key if isinstance(key, tuple) else (int(key), 0)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} ({self.split}) has {len(self)} images; there is no image {index}.")
        draws = Draws(self.seed, (index,)).keyed(iteration=iteration)
        image = self.transform(self.picture(index), draws)
        return {"image": to_float(image), "label": self.labels[index], "index": torch.tensor(index)}

    def views(self, index: int) -> Tensor:
        """Every view of one image `[views, 3, H, W]` in [-1, 1], in order: what a cache stores."""
        if not isinstance(self.transform, Views):
            raise ValueError(f"{self.transform} draws afresh every time, so its views cannot be listed or cached; "
                             "choose the augmentation none, flip or ten_crop, or train without a cache.")
        picture = self.picture(index)
        return torch.stack([to_float(self.transform.view(picture, number)) for number in range(self.transform.views)])

    def describe(self) -> dict[str, Any]:
        """What identifies the data set in manifests (JSON-serialisable)."""
        return {
            "name": self.name, "split": self.split, "count": len(self), "transform": repr(self.transform),
            "labels_hash": hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()[:16],
        }


def to_float(image: Image.Image) -> Tensor:
    """An RGB picture as float32 `[3, H, W]` in [-1, 1]: (value / 255 - 0.5) / 0.5, as the field's loaders do."""
    return pil_to_tensor(image).float().div_(255).sub_(0.5).div_(0.5)


class Digits(LabelledImages):
    """Scikit-learn's handwritten digits: 1797 real scans of 8 x 8, shipped in its wheel, so nothing is downloaded.

    The split is fixed: of a stratified shuffle with a fixed seed, 1297 images are "train" and 500 "heldout" (48 to 51
    of every digit). Grey values 0 .. 16 become 0 .. 255, and pictures are enlarged bicubically.

    Args:
        split: "train" or "heldout".
        image_size: one side of a square, or (height, width).
        augmentation: "none", "flip", "ten_crop", "random_crop" or a `Transform`.
        seed: seed of the augmentation (the split has its own).
    """

    name = "digits"
    splits = ("train", "heldout")
    HELDOUT, SPLIT_SEED = 500, 0

    def __init__(self, *, split: str = "train", image_size: int | tuple[int, int] = 16,
                 augmentation: str | Transform = "none", seed: int = 0) -> None:
        super().__init__(split=split, image_size=image_size, augmentation=augmentation, seed=seed)
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(labels)), test_size=self.HELDOUT, stratify=labels,
                                 random_state=self.SPLIT_SEED)
        rows = np.sort(parts[self.splits.index(split)])
        self.class_names = tuple(map(str, range(10)))
        self.labels = torch.from_numpy(labels[rows].astype(np.int64))
        self._images = np.rint(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")


class FashionMNIST(LabelledImages):
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey pictures, 28 x 28, of ten kinds of clothes.

    Args:
        split: "train" or "heldout", the official test set.
        root: folder with the four idx .gz files, or one that torchvision downloaded to. Without it: Debian's package
            `dataset-fashion-mnist`, where installed.
        image_size: one side of a square, or (height, width).
        augmentation: "none", "flip", "ten_crop", "random_crop" or a `Transform`.
        download: let torchvision download the files to `root` if they are not there.
        seed: seed of the augmentation.

    Raises:
        FileNotFoundError: the files are nowhere and `download` is off.
        ValueError: a file is truncated or not what its name says.
    """

    name = "fashion_mnist"
    splits = ("train", "heldout")
    DEBIAN = Path("/usr/share/datasets/fashion-mnist")

    def __init__(self, *, split: str = "train", root: str | Path | None = None, image_size: int | tuple[int, int] = 32,
                 augmentation: str | Transform = "none", download: bool = False, seed: int = 0) -> None:
        super().__init__(split=split, image_size=image_size, augmentation=augmentation, seed=seed)
        prefix = {"train": "train", "heldout": "t10k"}[split]
        names = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
        folder = self._folder(root, names, download)
        self._images, labels = (read_idx(folder / name) for name in names)
        if len(self._images) != len(labels):
            raise ValueError(f"{folder} has {len(self._images)} images but {len(labels)} labels; fetch it again.")
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.class_names = (
            "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

    @classmethod
    def _folder(cls, root: str | Path | None, names: Sequence[str], download: bool) -> Path:
        if download and root is None:
            raise ValueError("FashionMNIST(download=True) needs a root, the folder to download to.")
        candidates = [cls.DEBIAN] if root is None else [Path(root), Path(root) / "FashionMNIST" / "raw"]
        if download and not any((folder / names[0]).is_file() for folder in candidates):
            from torchvision.datasets import FashionMNIST as Downloader

            Downloader(str(root), download=True)
        for folder in candidates:
            if all((folder / name).is_file() for name in names):
                return folder
        raise FileNotFoundError(
            f"Fashion-MNIST ({', '.join(names)}) is not in {' or '.join(map(str, candidates))}. Install Debian's "
            "package dataset-fashion-mnist, or give root=FOLDER with the four .gz files, or root=FOLDER download=true."
        )

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file (MNIST's format: 0, 0, type, dimensions, then big-endian sides)."""
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError(f"its first bytes are {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a gzipped idx file ({error}); fetch it again.") from error


class ImageFolder(LabelledImages):
    """A folder with one folder of images per class, at any depth below it; classes are in alphabetical order.

    Args:
        root: the folder of class folders.
        image_size: one side of a square, or (height, width).
        augmentation: "none", "flip", "ten_crop", "random_crop" or a `Transform`.
        on_corrupt: "raise" refuses an unreadable image by name when it is asked for; "skip" reads every image once now
            and leaves unreadable ones out for good (logged by name), so that indices stay what they are.
        name: the name in manifests and tables; the root's own name if not given.
        split: the split's name in manifests and tables.
        seed: seed of the augmentation.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, or a class folder has no readable image.
    """

    def __init__(self, *, root: str | Path, image_size: int | tuple[int, int], augmentation: str | Transform = "none",
                 on_corrupt: str = "raise", name: str | None = None, split: str = "all", seed: int = 0) -> None:
        self.root = Path(root)
        self.name = name or self.root.resolve().name
        super().__init__(split=split, image_size=image_size, augmentation=augmentation, seed=seed)
        if on_corrupt not in ("raise", "skip"):
            raise unknown("on_corrupt", on_corrupt, ("raise", "skip"))
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}; give the folder that holds one folder per class.")
        folders = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if not folders:
            raise ValueError(f"{self.root} has no class folders; expected {self.root}/CLASS/*.png (or another of "
                             f"{', '.join(IMG_EXTENSIONS)}).")
        self._check_classes(folders)
        self.class_names = self._names(folders)
        files = [(path, label) for label, folder in enumerate(folders) for path in image_files(self.root / folder)]
        if on_corrupt == "skip":
            files = readable(files)
        self.files = [path for path, _ in files]
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        counts = torch.bincount(self.labels, minlength=len(folders))
        empty = [folder for folder, count in zip(folders, counts.tolist()) if count == 0]
        if empty:
            raise ValueError(f"{self.root}: no readable image ({', '.join(IMG_EXTENSIONS)}) in {len(empty)} of "
                             f"{len(folders)} class folders: {_some(empty)}. Fill or remove them.")

    def _check_classes(self, folders: Sequence[str]) -> None:
        """Raise ValueError unless the folders are the classes that they should be; here any will do."""

    def _names(self, folders: Sequence[str]) -> tuple[str, ...]:
        return tuple(folders)

    def picture(self, index: int) -> Image.Image:
        try:
            return read_image(self.files[index])
        except CORRUPT as error:
            raise ValueError(f"image {index}, {self.files[index]}, cannot be read ({error}). Mend or remove it, or use "
                             "on_corrupt=skip to leave unreadable images out.") from error


class ImageNet(ImageFolder):
    """ImageNet-1k (ILSVRC 2012) as one folder per wnid below root/train and root/val.

    A class is the wnid's place in the official, alphabetical order, which published checkpoints rely on; a folder that
    is missing, superfluous or not named by wnid would shift the classes, so it is an error.

    Args:
        root: the folder that holds the folders train and val.
        split: "train" or "val".
        image_size: one side of a square, or (height, width).
        augmentation: "none", "flip" (MAR family), "ten_crop" (LlamaGen's generators), "random_crop" (its tokenizer).
        on_corrupt: as in `ImageFolder`.
        seed: seed of the augmentation.
    """

    name = "imagenet"
    splits = ("train", "val")

    def __init__(self, *, root: str | Path, split: str = "train", image_size: int | tuple[int, int] = 256,
                 augmentation: str | Transform = "none", on_corrupt: str = "raise", seed: int = 0) -> None:
        super().__init__(root=Path(root) / split, image_size=image_size, augmentation=augmentation,
                         on_corrupt=on_corrupt, name=self.name, split=split, seed=seed)

    def _check_classes(self, folders: Sequence[str]) -> None:
        from timm.data import ImageNetInfo

        wnids = ImageNetInfo("imagenet-1k").label_names()
        if list(folders) != list(wnids):
            strange, missing = sorted(set(folders) - set(wnids)), sorted(set(wnids) - set(folders))
            raise ValueError(
                f"{self.root} is not ImageNet-1k: {len(folders)} class folders, expected the 1000 wnids n01440764 .. "
                f"n15075141; not wnids of ImageNet-1k: {_some(strange)}; missing: {_some(missing)}. "
                "For other classes use the data set image_folder."
            )

    def _names(self, folders: Sequence[str]) -> tuple[str, ...]:
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


CORRUPT = (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> Image.Image:
    """Decode an image file wholly, as RGB. Raises one of `CORRUPT` if it cannot."""
    with Image.open(path) as image:
        return image.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


def readable(files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The files that decode wholly, in order; the others are logged by name."""

    def problem(file: tuple[Path, int]) -> Exception | None:
        try:
            read_image(file[0])
        except CORRUPT as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, files))
    for (path, _), error in zip(files, problems):
        if error is not None:
            log.warning("skipped unreadable image %s (%s)", path, error)
    return [file for file, error in zip(files, problems) if error is None]
