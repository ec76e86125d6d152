"""Caches of what a tokenizer makes of a data set, so that a generator's training need not encode the same image again.

A cache is a folder:

    manifest.json     what it holds: tokenizer (name, hash of its weights), TokenSpec, data set, views, dtype, shape
    compressed.npy    `[images, views, *shape]`: ids or posterior moments, as `Tokenizer.compress` gives them
    copy_NAME.npy     the same of a copy of every view at another size, where copies are asked for
    labels.npy        `[images]` int64

It grows in a folder called NAME.partial, in blocks of fixed images whatever the number of processes, so that one and
many write the same bytes. Each process notes finished blocks in a log of its own; a killed build goes on from there.
When every block is written the folder is renamed, so a folder without ".partial" is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from varzoo.core.checkpoint import weights_hash
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.data.datasets import LabelledImages
from varzoo.data.files import create_once
from varzoo.data.sampler import Example
from varzoo.data.transforms import draw_view
from varzoo.tokenizers.base import Tokenizer

FORMAT = 1
MANIFEST, COMPRESSED, LABELS = "manifest.json", "compressed.npy", "labels.npy"
REBUILD = "delete the folder and build the cache again."


def build_cache(folder: str | Path, *, tokenizer: Tokenizer, dataset: LabelledImages, batch_size: int = 64,
                copies: Mapping[str, Sequence[int]] | None = None, num_workers: int = 0, rank: int = 0,
                world_size: int = 1, rebuild: bool = False, progress: bool = True) -> Path:
    """Write every view of every image of `dataset`, compressed by `tokenizer`, into `folder`, or go on doing so.

    With several processes, each calls this with its rank and writes its share; the cache is complete once all have
    returned. A complete cache that agrees is left as it is.

    Args:
        folder: where the cache is to be.
        tokenizer: on the device where it is to run; it is put into eval mode.
        dataset: its views are written; its transform must be one whose views can be listed.
        batch_size: images per block, and per call of the tokenizer. An interrupted build must go on with the same.
        copies: (height, width) of copies of every view by name, which are written beside it: resized bicubically
            without antialiasing (as Hi-MAR's pivots, arXiv 2505.20288), then compressed by the tokenizer at that size.
        num_workers: processes that decode images.
        rank: this process among `world_size`.
        world_size: how many processes build.
        rebuild: delete what is there if it belongs to something else, instead of refusing; for one process only.
        progress: show a progress bar on rank 0.

    Raises:
        ValueError: the folder, or its unfinished twin, is another tokenizer's or another data set's, or lacks copies;
            or the tokenizer takes no images of a copy's size.
    """
    if rebuild and world_size > 1:
        raise ValueError("rebuild=true deletes what other processes may be writing; delete the folder before starting.")
    folder = Path(folder)
    partial = _partial(folder)
    tokenizer.eval()
    manifest, copies = _describe(tokenizer, dataset), {name: list(size) for name, size in (copies or {}).items()}
    if copies:
        manifest["copies"] = copies
    encoders = {COMPRESSED: tokenizer, **{_copy(name): tokenizer.at_size(size) for name, size in copies.items()}}
    if folder.exists() and _agrees(folder, manifest, rebuild):
        return folder
    manifest["block"] = batch_size
    if (partial / MANIFEST).exists():
        _agrees(partial, manifest, rebuild)
    partial.mkdir(parents=True, exist_ok=True)
    blocks = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    finished = _finished(partial)
    todo = [number for number in range(rank, len(blocks), world_size) if number not in finished]
    loader = DataLoader(_AllViews(dataset), batch_sampler=[list(blocks[number]) for number in todo],
                        num_workers=num_workers)
    writer = None
    bar = tqdm(zip(todo, loader), total=len(todo), desc=f"caching {dataset.name}", disable=not progress or rank > 0)
    for number, images in bar:
        arrays = {name: _compress(encoder, images) for name, encoder in encoders.items()}
        writer = writer or _Writer(partial, manifest, arrays, dataset, rank)
        writer.write(number, blocks[number], arrays)
    if len(_finished(partial)) == len(blocks):
        _complete(partial, folder)
    return folder


class CachedTokens(Dataset):
    """A finished cache as a data set of `dict(compressed, label, index)`, memory-mapped.

    `compressed` is what `Tokenizer.tokens` takes: int64 ids or float32 moments. The view is drawn by (seed, index,
    iteration) exactly as the data set itself would draw it, so training with and without the cache sees the same. Where
    the cache has copies, `copies` holds the same view's by name.

    Args:
        folder: a cache that `build_cache` has completed.
        tokenizer: the tokenizer it must be of.
        seed: seed of the drawn views.

    Attributes:
        labels: the class of every image, int64.
        class_names: one name per class.
        manifest: what the cache says about itself.

    Raises:
        FileNotFoundError: there is no complete cache.
        ValueError: it is another tokenizer's, of another format, truncated or otherwise damaged.
    """

    def __init__(self, *, folder: str | Path, tokenizer: Tokenizer, seed: int = 0) -> None:
        folder = Path(folder)
        self.manifest = _read_manifest(folder)
        _require_same_tokenizer(folder, self.manifest, _describe_tokenizer(tokenizer))
        self.seed = seed
        self.class_names = tuple(self.manifest["class_names"])
        count, views = self.manifest["dataset"]["count"], self.manifest["views"]
        dtype = self.manifest["dtype"]
        self._compressed = _mapped(folder / COMPRESSED, (count, views, *self.manifest["shape"]), dtype)
        self._copies = {name: _mapped(folder / _copy(name), (count, views, *shape), dtype)
                        for name, shape in self.manifest.get("copy_shapes", {}).items()}
        self.labels = torch.from_numpy(np.array(_mapped(folder / LABELS, (count,), "int64")))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(**self.manifest["spec"])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def views(self) -> int:
        return self.manifest["views"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | Example) -> dict[str, Any]:
        index, iteration = key if isinstance(key, tuple) else (int(key), 0)
        if not 0 <= index < len(self):
            raise IndexError(f"the cache has {len(self)} images; there is no image {index}.")
        view = draw_view(self.views, Draws(self.seed, (index,)).keyed(iteration=iteration))

        def read(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[index, view].astype(np.int64 if array.dtype.kind == "u" else np.float32))

        copies = {name: read(array) for name, array in self._copies.items()}
        item = {"compressed": read(self._compressed), "label": self.labels[index], "index": torch.tensor(index)}
        return {**item, "copies": copies} if copies else item


class _AllViews(Dataset):
    """Every view of each image, `[views, 3, H, W]`."""

    def __init__(self, dataset: LabelledImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset.views(index)


class _Writer:
    """The arrays of an unfinished cache, and this process's log of finished blocks."""

    def __init__(self, partial: Path, manifest: Mapping[str, Any], first: Mapping[str, np.ndarray],
                 dataset: LabelledImages, rank: int) -> None:
        shapes = {name: list(array.shape[2:]) for name, array in first.items()}
        manifest = {**manifest, "dtype": first[COMPRESSED].dtype.name, "shape": shapes[COMPRESSED]}
        if "copies" in manifest:
            manifest["copy_shapes"] = {name: shapes[_copy(name)] for name in manifest["copies"]}
        create_once(partial / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2)))
        create_once(partial / LABELS, lambda path: np.save(path, dataset.labels.numpy()))
        self._arrays = {}
        for name, array in first.items():
            settings = {"mode": "w+", "dtype": array.dtype, "shape": (len(dataset), *array.shape[1:])}
            create_once(partial / name, lambda path, with_=settings: (  # type: ignore[misc]  # one argument is given
                np.lib.format.open_memmap(path, **with_).flush()))
            self._arrays[name] = np.lib.format.open_memmap(partial / name, mode="r+")
        self._log = partial / f"finished-{rank}.log"

    def write(self, number: int, rows: range, compressed: Mapping[str, np.ndarray]) -> None:
        for name, array in compressed.items():
            self._arrays[name][rows.start:rows.stop] = array
            self._arrays[name].flush()
        with open(self._log, "a") as file:  # only after the data: a block is in the log or will be written again
            file.write(f"\n[{number}]")  # the line begins anew, whatever a killed process left of its last


def _finished(partial: Path) -> set[int]:
    """Blocks that some process has noted as finished; a torn line counts for nothing."""
    text = ""
    for log in partial.glob("finished-*.log"):
        with contextlib.suppress(FileNotFoundError):  # another process has just completed the cache
            text += log.read_text() + "\n"
    return {int(number) for number in re.findall(r"^\[(\d+)\]$", text, re.MULTILINE)}


def _complete(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except FileNotFoundError:  # another process was first
        return
    for log in folder.glob("finished-*.log"):
        log.unlink()


def _compress(tokenizer: Tokenizer, images: Tensor) -> np.ndarray:
    """Images `[B, views, 3, H, W]` -> `[B, views, *shape]`, ids in the smallest unsigned type, all else in float32.

    Images of another size than the tokenizer's are resized first.
    """
    device = next((tensor.device for tensor in tokenizer.state_dict().values()), torch.device("cpu"))
    with torch.no_grad():  # view by view, so that memory does not grow with their number
        views = [_resized(view.to(device), tokenizer.image_size) for view in images.unbind(1)]
        compressed = torch.stack([tokenizer.compress(view).cpu() for view in views], 1)
    if compressed.is_floating_point():
        return compressed.float().numpy()
    if int(compressed.min()) < 0 or int(compressed.max()) >= tokenizer.spec.size:
        raise ValueError(f"the tokenizer gave ids {int(compressed.min())} .. {int(compressed.max())}, outside its "
                         f"codebook of {tokenizer.spec.size}.")
    return compressed.numpy().astype(np.min_scalar_type(tokenizer.spec.size - 1))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[B, 3, *size]`: bicubic without antialiasing or clamping, as the official cache of Hi-MAR."""
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bicubic", antialias=False)


def _copy(name: str) -> str:
    """The file of the copies of that name."""
    return f"copy_{name}.npy"


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    identity = {"name": type(tokenizer).__name__, "hash": weights_hash(tokenizer.state_dict())}
    return _as_json({"tokenizer": identity, "spec": asdict(tokenizer.spec)})


def _describe(tokenizer: Tokenizer, dataset: LabelledImages) -> dict[str, Any]:
    if tuple(tokenizer.image_size) != dataset.image_size:
        raise ValueError(f"the tokenizer takes images of {tuple(tokenizer.image_size)}, {dataset.name} gives "
                         f"{dataset.image_size}; set the data set's image_size to the tokenizer's.")
    return {"format": FORMAT, **_describe_tokenizer(tokenizer), "dataset": dataset.describe(),
            "class_names": list(dataset.class_names), "views": len(dataset.views(0))}


def _as_json(value: Any) -> Any:
    """The value as it will be read again: tuples have become lists."""
    return json.loads(json.dumps(value))


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        advice = "build it first."
        if _partial(folder).exists():
            advice = f"{_partial(folder).name} is unfinished: call build_cache again to go on with it."
        raise FileNotFoundError(f"there is no token cache at {folder}; {advice}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); {REBUILD}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}; {REBUILD}")
    return manifest


def _require_same_tokenizer(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found["tokenizer"] != expected["tokenizer"]:
        theirs, ours = (" ".join(side["tokenizer"].values()) for side in (found, expected))
        raise ValueError(f"{folder} is the cache of another tokenizer: {theirs}, not {ours}. Use that tokenizer, or "
                         "build a cache of this one in another folder.")
    if found["spec"] != expected["spec"]:
        raise ValueError(f"{folder} holds {TokenSpec(**found['spec'])}, but the tokenizer makes "
                         f"{TokenSpec(**expected['spec'])}.")


def _agrees(folder: Path, manifest: Mapping[str, Any], replace: bool) -> bool:
    """Whether the cache in `folder` is what `manifest` describes; if not, delete it (`replace`) or raise ValueError."""
    try:
        found = _read_manifest(folder)
        _require_same_tokenizer(folder, found, manifest)
        differing = [name for name, value in manifest.items() if found.get(name) != value]
        if differing:
            raise ValueError(f"{folder} is another cache: " + "; ".join(
                f"{name} is {found.get(name)}, expected {manifest[name]}" for name in differing) + ".")
    except (ValueError, FileNotFoundError) as error:
        if not replace:
            raise ValueError(f"{error} Choose another folder, delete it, or build with rebuild=true.") from error
        shutil.rmtree(folder)
        return False
    return True


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is missing or truncated ({error}); {REBUILD}") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, its manifest says {dtype} {shape}; {REBUILD}")
    return array
