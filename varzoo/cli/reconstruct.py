"""Reconstruct a data set with a tokenizer, for rFID, PSNR, SSIM, LPIPS; and count which codes it uses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from varzoo.cli.measuring import dataset_by_name
from varzoo.cli.options import Options
from varzoo.cli.processes import Processes
from varzoo.core.checkpoint import weights_hash
from varzoo.core.draws import Draws
from varzoo.core.errors import unknown
from varzoo.data.datasets import ImageFolder, LabelledImages
from varzoo.eval.reconstruction import CodebookUsage
from varzoo.eval.writers import PNGFolder
from varzoo.loading import load_tokenizer
from varzoo.tokenizers.base import to_uint8


@torch.no_grad()
def reconstruct(options: Options, processes: Processes) -> dict[str, Any]:
    """Write OUT/originals and OUT/reconstructions, both from one crop of the images; returns the codebook's usage.

    Raises:
        ValueError: there is no such data set.
    """
    begun = time.perf_counter()
    tokenizer = load_tokenizer(options["reconstruct"]).to(processes.device)
    dataset = images_of(options, tokenizer.image_size)
    identity = {"data": dataset.describe(), "tokenizer": weights_hash(tokenizer.state_dict()), "count": len(dataset),
                "label_scheme": "as in the data set"}
    folder = Path(options["out"])
    originals, decoded = (PNGFolder(folder=folder / name, manifest={**identity, "uint8_rule": rule})
                          for name, rule in (("originals", "round"), ("reconstructions", tokenizer.uint8_rule)))
    usage = None
    if tokenizer.spec.kind == "discrete":
        usage = CodebookUsage(size=tokenizer.spec.size, count=len(dataset))
    mine = torch.arange(processes.rank, len(dataset), processes.world_size)
    for rows in mine.split(options.whole("batch_size")):
        images = torch.stack([dataset[int(row)]["image"] for row in rows]).to(processes.device)
        tokens = tokenizer.encode(images)
        if usage is not None:
            usage.update(tokens, rows)
        missing = set(decoded.missing(rows.tolist())) | set(originals.missing(rows.tolist()))
        if missing:
            labels = dataset.labels[rows]
            draws = Draws(0, tuple(rows.tolist()), processes.device)
            decoded.write(tokenizer.to_uint8(tokenizer.decode(tokens, draws)), rows.tolist(), labels.tolist())
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


def images_of(options: Options, image_size: tuple[int, int]) -> LabelledImages:
    """A data set by name, or a folder with one sub-folder per class, in ADM's centre crop at the tokenizer's size."""
    named = dataset_by_name(options["data"], options["root"], image_size=image_size)
    if named is not None:
        return named
    if not Path(options["data"]).is_dir():
        raise unknown("data set", options["data"], ("digits", "digits_train", "fashion_mnist", "fashion_mnist_train"))
    return ImageFolder(root=options["data"], image_size=image_size)


