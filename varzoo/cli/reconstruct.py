"""Reconstruct images with a tokenizer: a whole data set for rFID and the codes it uses, or some of them to look at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from varzoo.cli.measuring import dataset_by_name
from varzoo.cli.options import Options
from varzoo.cli.processes import Processes
from varzoo.core.checkpoint import weights_hash
from varzoo.core.draws import Draws
from varzoo.core.errors import unknown
from varzoo.data.datasets import ImageFolder, LabelledImages, image_files, read_image
from varzoo.eval.reconstruction import CodebookUsage, PairScores
from varzoo.eval.writers import PNGFolder, save_grid
from varzoo.loading import load_tokenizer
from varzoo.nn.lpips import LPIPS
from varzoo.tokenizers.base import Tokenizer, to_uint8

COLUMNS = 8  # of a grid to look at


@torch.no_grad()
def reconstruct(options: Options, processes: Processes) -> dict[str, Any]:
    """Write OUT/originals and OUT/reconstructions, both from one crop of the images; returns the codebook's usage.

    Raises:
        ValueError: there is no such data set.
    """
    begun = time.perf_counter()
    tokenizer = load_tokenizer(options["reconstruct"]).to(processes.device)
    dataset = images_of(options["data"], options.get("root"), tokenizer.image_size)
    identity = {"data": dataset.describe(), "tokenizer": weights_hash(tokenizer.state_dict()), "count": len(dataset),
                "label_scheme": "as in the data set"}
    folder = Path(options["out"])
    originals, decoded = (PNGFolder(folder=folder / name, manifest={**identity, "uint8_rule": rule})
                          for name, rule in (("originals", "round"), ("reconstructions", tokenizer.uint8_rule)))
    usage = None
    if tokenizer.spec.kind == "discrete":
        usage = CodebookUsage(size=tokenizer.spec.size, count=len(dataset))
    mine = torch.arange(processes.rank, len(dataset), processes.world_size)
    for rows, images, tokens in encoded(tokenizer, dataset, mine, options.whole("batch_size"), processes.device):
        if usage is not None:
            usage.update(tokens, rows)
        missing = set(decoded.missing(rows.tolist())) | set(originals.missing(rows.tolist()))
        if missing:
            labels = dataset.labels[rows]
            decoded.write(redrawn(tokenizer, tokens, rows), rows.tolist(), labels.tolist())
            originals.write(to_uint8(images), rows.tolist(), labels.tolist())
    if usage is not None and processes.many:
        usage.all_reduce()
    values = {} if usage is None else usage.result()
    row = {**values, "run": identity, "seconds": round(time.perf_counter() - begun, 2)}
    processes.wait()
    if processes.first:
        shown = "".join(f"   {name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        print(f"{len(dataset)} images{shown}\nscore them: python -m varzoo.eval samples={folder / 'reconstructions'} "
              f"reference={folder / 'originals'} reference_type=validation protocol=tokenizer")
    return row


def encoded(tokenizer: Tokenizer, dataset: LabelledImages, rows: Tensor, batch_size: int,
            device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of some images of a data set: their rows `[B]`, images `[B, 3, H, W]` in [-1, 1], tokens."""
    for part in rows.split(batch_size):
        images = torch.stack([dataset[int(row)]["image"] for row in part]).to(device)
        yield part, images, tokenizer.encode(images)


def redrawn(tokenizer: Tokenizer, tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens of images `[B]` decoded, uint8; an image depends on its row alone."""
    return tokenizer.to_uint8(tokenizer.decode(tokens, Draws(0, tuple(rows.tolist()), tokens.device)))


@torch.no_grad()
def compare(tokenizer: Tokenizer, dataset: LabelledImages, path: Path, *, count: int, batch_size: int, lpips: str,
            device: str) -> dict[str, float]:
    """Score reconstructions of the first `count` images, and write a PNG of originals (odd rows) and them (even rows).

    Args:
        lpips: "alex", "vgg" or "none".

    Returns:
        PSNR, SSIM and LPIPS by name, means over the images.

    Raises:
        ValueError: the data set has fewer images, or LPIPS takes no images so small.
        FileNotFoundError: weights of LPIPS are absent; the message says where to get them and how to do without.
    """
    if not 1 <= count <= len(dataset):
        raise ValueError(f"{len(dataset)} images are there, so count is between 1 and that, got {count}.")
    scores = PairScores(count=count, lpips=None if lpips == "none" else LPIPS.pretrained(lpips).to(device))
    tokenizer, pairs = tokenizer.to(device), []
    for rows, images, tokens in encoded(tokenizer, dataset, torch.arange(count), batch_size, device):
        originals, reconstructions = to_uint8(images), redrawn(tokenizer, tokens, rows)
        scores.update(reconstructions, originals, rows)
        pairs.append(torch.stack([originals, reconstructions]).cpu())
    columns = min(count, COLUMNS)
    shown = torch.cat(pairs, dim=1)[:, :count // columns * columns]  # whole rows
    names = ["original", "reconstruction"] * (shown.shape[1] // columns)
    save_grid(path, rearrange(shown, "two (row column) ... -> (row two column) ...", column=columns), names)
    return scores.result()


def images_of(name: str, root: str | None, image_size: tuple[int, int]) -> LabelledImages:
    """A data set by name, or a folder of images, sorted by class folder or not, in ADM's centre crop at a size."""
    named = dataset_by_name(name, root, image_size=image_size)
    if named is not None:
        return named
    folder = Path(name)
    if not folder.is_dir():
        raise unknown("data set", name, ("digits", "digits_train", "fashion_mnist", "fashion_mnist_train"))
    sorted_by_class = any(entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir())
    return (ImageFolder if sorted_by_class else Pictures)(root=folder, image_size=image_size)


class Pictures(LabelledImages):
    """A folder of images that are of no class.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, *, root: Path, image_size: tuple[int, int]) -> None:
        super().__init__(split="all", image_size=image_size, augmentation="none", seed=0)
        self.name, self.files, self.class_names = root.resolve().name, image_files(root), ("none",)
        self.labels = torch.zeros(len(self.files), dtype=torch.int64)
        if not self.files:
            raise ValueError(f"{root} holds no images: give a folder of images, or of one folder of images per class.")

    def picture(self, index: int) -> Image.Image:
        return read_image(self.files[index])
