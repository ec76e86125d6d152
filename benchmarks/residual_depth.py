"""What residual quantisation gains by depth: held-out reconstruction error of digits at depths 1, 2, 4 and 8.

    python benchmarks/residual_depth.py [--steps 200] [--runs runs/depth] [--out docs/images/residual_depth.png]

Trains experiment=digits_rqvae once per depth, prints a table, and draws the curve: of the trained depths, and of the
deepest code decoded from its first levels alone. Runs that are there already are measured as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from varzoo.loading import build, compose_config, load_tokenizer
from varzoo.nn.codebook import perplexity
from varzoo.training.run import train

DEPTHS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs/depth"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/residual_depth.png"))
    options = parser.parse_args()
    heldout = build(compose_config("train", ["experiment=digits_rqvae"]).data.heldout)
    images = torch.stack([heldout[index]["image"] for index in range(len(heldout))])
    errors = {}
    print("| depth | held-out MSE | from the first 1, 2, ... levels | codes used per level | perplexity per level |")
    print("| --- | --- | --- | --- | --- |")
    for depth in DEPTHS:
        folder = train(compose_config("train", [
            "experiment=digits_rqvae", f"tokenizer.depth={depth}", f"steps={options.steps}", "samples_every=0",
            f"validate_every={options.steps}", f"run_dir={options.runs / str(depth)}"]))
        tokenizer = load_tokenizer(folder)
        with torch.no_grad():
            tokens = tokenizer.encode(images)
            levels = [(tokenizer.preview(tokens, level) - images).square().mean().item()
                      for level in range(1, depth + 1)]
        levels_of_ids = tokens.view(*tokens.shape[:2], -1).unbind(-1)
        used = [len(ids.unique()) for ids in levels_of_ids]
        evenness = [perplexity(ids, tokenizer.spec.size).item() for ids in levels_of_ids]
        errors[depth] = levels
        print(f"| {depth} | {levels[-1]:.5f} | {', '.join(f'{error:.5f}' for error in levels)} | "
              f"{', '.join(map(str, used))} | {', '.join(f'{value:.0f}' for value in evenness)} |", flush=True)

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(DEPTHS, [errors[depth][-1] for depth in DEPTHS], marker="o", label="trained at this depth")
    axes.plot(range(1, DEPTHS[-1] + 1), errors[DEPTHS[-1]], marker=".", linestyle="--",
              label=f"first levels of depth {DEPTHS[-1]}")
    axes.set(xlabel="codes per position", ylabel="held-out MSE (images in [-1, 1])", yscale="log",
             title=f"digits, 4 x 4 positions, 128 codes, {options.steps} steps")
    axes.legend()
    axes.grid(alpha=0.3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
