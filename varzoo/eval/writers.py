"""Where samples are kept: a folder of PNGs, or ADM's .npz; both can be resumed and refuse another run's output.

Every sample has a global index, which names its file or its row. A manifest of the run (whatever settings decide what
sample i looks like) lies beside; writing on with other settings is an error, and what exists is not drawn again.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from varzoo.core.checkpoint import atomic_path
from varzoo.data.files import create_once
from varzoo.eval.readers import MANIFEST, read_manifest


class SampleWriter(ABC):
    """A place for samples. `write` what is `missing`, then `close`."""

    @abstractmethod
    def existing(self) -> set[int]:
        """Indices of the samples that are already there."""

    @abstractmethod
    def write(self, images: Tensor, indices: Sequence[int], labels: Sequence[int] | None = None) -> None:
        """Write uint8 images `[B, 3, H, W]` under their global indices, with the classes asked for if there are any."""

    @abstractmethod
    def close(self) -> None:
        """Finish the output, once every sample is written."""

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the indices that are still to be drawn."""
        existing = self.existing()
        return [index for index in indices if index not in existing]


class PNGFolder(SampleWriter):
    """Samples as 000000.png, 000001.png, ... in a folder, each with its class as the PNG text "label".

    Args:
        folder: new, empty, or of the same run.
        manifest: the run's settings (JSON-serialisable).

    Raises:
        ValueError: the folder holds another run, or files that are no run's.
    """

    def __init__(self, *, folder: str | Path, manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        _claim(self.folder, manifest)

    def existing(self) -> set[int]:
        return {int(path.stem) for path in self.folder.glob("*.png") if path.stem.isdigit()}

    def write(self, images: Tensor, indices: Sequence[int], labels: Sequence[int] | None = None) -> None:
        _check(images, indices, labels)
        for row, index in enumerate(indices):
            info = PngInfo()
            if labels is not None:
                info.add_text("label", str(int(labels[row])))
            with atomic_path(self.folder / f"{int(index):06d}.png") as path:
                to_pil_image(images[row].cpu()).save(path, "PNG", pnginfo=info)

    def close(self) -> None:
        """Every PNG was finished when it was written."""


class NpzFile(SampleWriter):
    """Samples as one .npz in ADM's layout: arr_0 uint8 `[count, H, W, 3]`, and arr_1 their classes if there are any.

    Rows are collected, memory-mapped, in NAME.npz.partial, and streamed into the .npz by `close`. Several processes may
    write their rows; one of them closes, after the others have finished.

    Args:
        path: the .npz to write.
        manifest: the run's settings (JSON-serialisable); stored in the .npz too, as the JSON text `manifest`.
        count: number of samples.
        image_size: (height, width).

    Raises:
        ValueError: the file, or its unfinished twin, is another run's.
    """

    def __init__(self, *, path: str | Path, manifest: Mapping[str, Any], count: int,
                 image_size: tuple[int, int]) -> None:
        self.path, self.count = Path(path), count
        self.manifest = {**manifest, "count": count, "image_size": list(image_size)}
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._finished = self.path.exists()
        if self._finished:
            _require_same_run(self.path, read_manifest(self.path), self.manifest)
            return
        _claim(self._partial, self.manifest)
        self._images = self._array("images", (count, *image_size, 3), np.uint8)
        self._labels = self._array("labels", (count,), np.int64)
        self._state = self._array("state", (count,), np.uint8)  # 0 missing, 1 there, 2 there and labelled

    def _array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.memmap:
        path = self._partial / f"{name}.npy"
        create_once(path, lambda new: np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=shape).flush())
        return np.lib.format.open_memmap(path, mode="r+")

    def existing(self) -> set[int]:
        return set(range(self.count)) if self._finished else set(np.flatnonzero(self._state).tolist())

    def write(self, images: Tensor, indices: Sequence[int], labels: Sequence[int] | None = None) -> None:
        _check(images, indices, labels)
        if self._finished:
            raise ValueError(f"{self.path} is finished; nothing is missing.")
        rows = [int(index) for index in indices]
        if rows and not 0 <= min(rows) <= max(rows) < self.count:
            raise ValueError(f"sample indices must lie in 0 .. {self.count - 1}, got {min(rows)} .. {max(rows)}.")
        self._images[rows] = images.permute(0, 2, 3, 1).cpu().numpy()
        if labels is not None:
            self._labels[rows] = [int(label) for label in labels]
        self._images.flush()
        self._labels.flush()
        self._state[rows] = 1 if labels is None else 2  # only after the data: a row is whole or counts as missing
        self._state.flush()

    def close(self) -> None:
        """Write the .npz. Raises ValueError if samples are missing; what was written stays for the next run."""
        if self._finished:
            return
        missing = self.missing(range(self.count))
        if missing:
            raise ValueError(f"{len(missing)} of {self.count} samples are missing, the first is {missing[0]}; "
                             f"{self._partial} keeps the others.")
        with atomic_path(self.path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            _stream(archive, "arr_0", self._images)
            if (self._state == 2).all():
                _stream(archive, "arr_1", self._labels)
            _stream(archive, "manifest", np.array(json.dumps(self.manifest)))
        self._finished = True
        del self._images, self._labels, self._state
        shutil.rmtree(self._partial)


def _stream(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write an array into an .npz in pieces: 50,000 images of 256 x 256 do not fit into memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        if array.ndim == 0:
            file.write(array.tobytes())
        for start in range(0, len(array) if array.ndim else 0, 256):
            file.write(np.ascontiguousarray(array[start:start + 256]).tobytes())


def _check(images: Tensor, indices: Sequence[int], labels: Sequence[int] | None) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"samples are written as uint8 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}.")
    if len(indices) != len(images) or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images need as many indices and labels, got {len(indices)} and "
                         f"{'none' if labels is None else len(labels)}.")


def _claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make the folder this run's, or see that it already is."""
    file = folder / MANIFEST
    strange = not file.is_file() and folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()))
    if strange:
        raise ValueError(f"{folder} exists and is no output of varzoo (it has no {MANIFEST}); choose another folder.")
    create_once(file, lambda path: path.write_text(json.dumps(manifest, indent=2)))
    _require_same_run(folder, read_manifest(folder), manifest)


def _require_same_run(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        differing = "; ".join(f"{name} was {found.get(name)!r}, now {expected.get(name)!r}" for name in names)
        raise ValueError(f"{path} holds another run: {differing}. Choose another folder, or delete that one.")


def image_grid(images: Tensor, row_names: Sequence[str], *, scale: int = 1, padding: int = 2) -> Image.Image:
    """A picture of images in rows, with the name of each row at its left.

    Args:
        images: uint8 `[rows * columns, 3, H, W]`, row by row.
        row_names: one name per row, such as the classes that were asked for.
        scale: enlargement of every pixel, for small images.
        padding: pixels between images.
    """
    if not row_names or len(images) % len(row_names):
        raise ValueError(f"{len(images)} images cannot fill {len(row_names)} rows equally.")
    images = images.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = to_pil_image(make_grid(images, nrow=len(images) // len(row_names), padding=padding, pad_value=255))
    row_height = images.shape[2] + padding
    font = ImageFont.load_default(max(10, min(24, row_height // 2)))
    margin = 12 + max(int(font.getlength(name)) for name in row_names)
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        draw.text((margin - 6, padding + row * row_height + images.shape[2] // 2), name, "black", font, anchor="rm")
    return picture


def save_grid(path: Path, images: Tensor, row_names: Sequence[str]) -> None:
    """Write uint8 images `[rows * columns, 3, H, W]` as one PNG, the rows named; small images are enlarged."""
    scale = max(1, 64 // images.shape[-1])
    with atomic_path(path) as temporary:
        image_grid(images, row_names, scale=scale).save(temporary, format="PNG")
