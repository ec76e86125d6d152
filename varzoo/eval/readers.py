"""Samples on disk, ours or other people's: folders of images, ADM's .npz, clips."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from varzoo.eval.score import Samples

MANIFEST = "manifest.json"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a PNG folder or an .npz; empty for samples of another origin."""
    path = Path(path)
    if path.is_dir():
        return json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).is_file() else {}
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["manifest"])) if "manifest" in file else {}


class SampleReader:
    """Samples in a folder of images or in an .npz with arr_0, in order.

    Args:
        path: a folder of images, in the order of their names (of their numbers, where names are numbers); or an .npz
            with arr_0 uint8 `[N, H, W, 3]` (clips `[N, T, H, W, 3]`, uint8 or float32 in [0, 1]), and arr_1 `[N]` if
            there are labels.
        labels: classes `[N]`, for samples that do not carry them.
        batch_size: samples per batch.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no samples, or what cannot be read as such, or the labels are not as many.
    """

    def __init__(self, *, path: str | Path, labels: Sequence[int] | None = None, batch_size: int = 64) -> None:
        self.path, self.batch_size = Path(path), batch_size
        if self.path.is_dir():
            files = [file for file in self.path.iterdir()  # hidden ones are what a killed process left half written
                     if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")]
            numbered = all(file.stem.isdigit() for file in files)
            self._files = sorted(files, key=lambda file: int(file.stem) if numbered else file.name)
            self._count = len(self._files)
        elif self.path.is_file():
            self._header, stored = self._open_npz()
            self._count = self._header[0][0]
            labels = stored if labels is None else labels
        else:
            raise FileNotFoundError(f"there are no samples at {self.path}; give a folder of PNGs or an .npz file.")
        if not self._count:
            raise ValueError(f"{self.path} holds no samples.")
        if labels is not None and len(labels) != self._count:
            raise ValueError(f"{self.path} holds {self._count} samples, but {len(labels)} labels were given.")
        self._given = labels

    def __len__(self) -> int:
        """Number of samples."""
        return self._count

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the first sample."""
        if self.path.is_file():
            height, width = self._header[0][-3:-1]
        else:
            height, width = self._read_file(self._files[0])[0].shape[1:]
        return height, width

    @property
    def frames(self) -> int:
        """Frames of a clip, 0 for images."""
        return self._header[0][1] if self.path.is_file() and len(self._header[0]) == 5 else 0

    def __iter__(self) -> Iterator[Samples]:
        return self.batches(lambda _: True)

    def batches(self, wanted: Callable[[Tensor], bool]) -> Iterator[Samples]:
        """The batches whose indices `[B]` are `wanted`; others are not read."""
        parts = [torch.arange(start, min(start + self.batch_size, self._count))
                 for start in range(0, self._count, self.batch_size)]
        read = self._read_folder if self.path.is_dir() else self._read_npz
        for indices, (images, labels) in read([(indices, wanted(indices)) for indices in parts]):
            if self._given is not None:
                labels = torch.tensor([int(label) for label in self._given[int(indices[0]):int(indices[-1]) + 1]])
            yield Samples(images, labels, indices)

    def _read_folder(self, parts: list[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor | None]]]:
        for indices, wanted in parts:
            if not wanted:
                continue
            read = [self._read_file(self._files[index]) for index in indices]
            sizes = {tuple(image.shape[1:]) for image, _ in read}
            if len(sizes) > 1:
                raise ValueError(f"{self.path} holds images of different sizes, such as {sorted(sizes)[:2]}.")
            labels = [int(label) for _, label in read if label is not None]
            yield indices, (torch.stack([image for image, _ in read]),
                            torch.tensor(labels) if len(labels) == len(read) else None)

    @staticmethod
    def _read_file(path: Path) -> tuple[Tensor, str | None]:
        try:
            with Image.open(path) as image:
                return pil_to_tensor(image.convert("RGB")), image.info.get("label")
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} is truncated or no image ({error}); delete it and draw it again.") from error

    def _open_npz(self) -> tuple[tuple[tuple[int, ...], bool, np.dtype], list[int] | None]:
        """The header of arr_0, and the labels if there are any."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if "arr_0" not in file:
                    raise ValueError(f"it has no samples arr_0, only {', '.join(file.files)}")
                labels = file["arr_1"].tolist() if "arr_1" in file else None
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                header = _array_header(file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is no file of samples: {error}.") from error
        shape, fortran, dtype = header
        images, clips = len(shape) == 4 and dtype == np.uint8, len(shape) == 5 and dtype in (np.uint8, np.float32)
        if not (images or clips) or shape[-1] != 3 or fortran:
            raise ValueError(f"arr_0 of {self.path} must be uint8 [N, H, W, 3] (clips [N, T, H, W, 3], also float32), "
                             "in C "
                             f"order; it is {dtype} {shape}.")
        return header, labels

    def _read_npz(self, parts: list[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, tuple[Tensor, None]]]:
        (_, *shape), _, dtype = self._header
        size = int(np.prod(shape)) * dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _array_header(file)
            for indices, wanted in parts:
                if not wanted:
                    file.seek(size * len(indices), 1)
                    continue
                try:
                    content = file.read(size * len(indices))
                    images = np.frombuffer(content, dtype).reshape(len(indices), *shape)
                except (ValueError, EOFError, zipfile.BadZipFile) as error:
                    raise ValueError(f"{self.path} is truncated ({error}); write it again.") from error
                yield indices, (torch.from_numpy(np.moveaxis(images, -1, -3).copy()), None)


def _array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
