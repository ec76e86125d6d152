"""How well the first k tokens of held-out images reconstruct them, for any tokenizer of which every prefix decodes.

    python benchmarks/prefix_reconstruction.py runs/digits_flextok [--out docs/images/flextok_digits] [--images 250]
        [--noises 8]

Writes OUT_curve.png (mean squared error over k: mean, and the middle 80 % of images) and OUT_grid.png (originals above
their reconstructions from 1, 2, 4, ... tokens), and prints the numbers. A generative decoder fills in what the tokens
leave open by noise; the mean image of several noises has less of that, and so tells what the tokens say. Both errors
are measured. The checkpoint is a run of train.py, or a tokenizer's file with --data NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from varzoo.core.checkpoint import atomic_path
from varzoo.core.draws import Draws
from varzoo.data import LabelledImages
from varzoo.eval.writers import save_grid
from varzoo.loading import build, compose_config, load_tokenizer
from varzoo.tokenizers.base import Tokenizer


@torch.no_grad()
def reconstructions(tokenizer: Tokenizer, images: Tensor, counts: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Images in [-1, 1] from the first k tokens, `[seeds, counts, B, 3, H, W]`; every k has the noise of its seed."""
    tokens = tokenizer.encode(images)
    noises = [Draws(seed, range(len(images))) for seed in seeds]
    return torch.stack([torch.stack([tokenizer.decode(tokens[:, :k], draws).clamp(-1, 1) for k in counts])
                        for draws in tqdm(noises, desc="decoding", unit="noise")])


def errors(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of every image, `[counts, B]`, of reconstructions `[counts, B, 3, H, W]`."""
    return (decoded - images).square().flatten(2).mean(dim=2)


def plot(path: Path, counts: Sequence[int], error: Tensor, of_mean: Tensor, title: str) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    low, high = error.quantile(torch.tensor([0.1, 0.9]), dim=1)
    axes.fill_between(counts, low, high, alpha=0.25, label="middle 80 % of images")
    axes.plot(counts, error.mean(dim=1), marker="o", markersize=3, label="one decoding, mean")
    axes.plot(counts, of_mean.mean(dim=1), marker="o", markersize=3, label="mean image of several, mean")
    axes.set(xlabel="tokens k", ylabel="mean squared error, pixels in [-1, 1]", title=title, ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", default=None, help="a data config, where the checkpoint is no run of train.py")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--noises", type=int, default=8, help="decodings of which the mean image is taken")
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="prefix of the two pictures; by default in the run")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.checkpoint)
    if not tokenizer.spec.prefix_decodes:
        parser.error(f"{options.checkpoint} makes {tokenizer.spec}, of which no prefix decodes.")
    run = options.checkpoint / "config.yaml"
    if options.data is None and not run.is_file():
        parser.error(f"{options.checkpoint} is no run of train.py: say which images, as in --data digits.")
    data = compose_config("train", [f"data={options.data}"]).data if options.data else OmegaConf.load(run).data
    dataset: LabelledImages = build(data.heldout)
    images = torch.stack([dataset[index]["image"] for index in range(min(options.images, len(dataset)))])
    length = tokenizer.spec.length
    counts = list(range(1, length + 1)) if length <= 32 else [*range(1, 17), *range(32, length + 1, 16)]
    counts = [k for k in counts if k >= tokenizer.shortest_prefix]
    all_decoded = reconstructions(tokenizer, images, counts, range(options.seed, options.seed + options.noises))
    decoded = all_decoded[0]
    error, of_mean = errors(decoded, images), errors(all_decoded.mean(dim=0), images)

    out = options.out or options.checkpoint / "prefix"
    plot(out.with_name(f"{out.name}_curve.png"), counts, error, of_mean,
         f"{options.checkpoint.name}: {len(images)} held-out images")
    shown = [k for k in counts if k & (k - 1) == 0]
    rows = [images, *(decoded[counts.index(k)] for k in shown)]
    pixels = torch.cat([tokenizer.to_uint8(row[:options.columns]) for row in rows])
    save_grid(out.with_name(f"{out.name}_grid.png"), pixels, ["original", *(f"k = {k}" for k in shown)])
    print(f"| k | mean squared error | 10 % | 90 % | of the mean image of {options.noises} |\n"
          "| --- | --- | --- | --- | --- |")
    for k, row, mean_row in zip(counts, error, of_mean):
        low, high = row.quantile(torch.tensor([0.1, 0.9]))
        print(f"| {k} | {row.mean():.4f} | {low:.4f} | {high:.4f} | {mean_row.mean():.4f} |")
    for what, values in (("one decoding", error), ("the mean image", of_mean)):
        rises = [f"{counts[i]} to {counts[i + 1]}" for i, step in enumerate(values.mean(dim=1).diff()) if step > 0]
        print(f"the error of {what} " + (f"rises from k = {', '.join(rises)}" if rises else "never rises"))


if __name__ == "__main__":
    main()
