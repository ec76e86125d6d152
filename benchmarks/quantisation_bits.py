"""What TokenBridge's quantiser costs a trained VAE: held-out reconstruction error at 2, 4, 6 and 8 bits per channel.

    python benchmarks/quantisation_bits.py runs/digits_kl [--bits 2 4 6 8] [--images 500] [--out docs/images/x.png]

The checkpoint is the run of a continuous tokenizer. Prints a table, bits against the unquantised VAE, and draws it as a
curve.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from varzoo.core.checkpoint import atomic_path
from varzoo.loading import build, load_tokenizer
from varzoo.nn.gaussian_quantizer import GaussianQuantizer
from varzoo.tokenizers.tokenbridge import TokenBridgeTokenizer, quantization_statistics


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--range", type=float, nargs=2, default=[-5.0, 5.0], metavar=("LOW", "HIGH"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=None, help="the picture; by default in the run")
    options = parser.parse_args()
    vae = load_tokenizer(options.run)
    heldout = build(OmegaConf.load(options.run / "config.yaml").data.heldout)
    images = torch.stack([heldout[index]["image"] for index in range(min(options.images, len(heldout)))])
    plain = vae.decode(vae.encode(images)).clamp(-1, 1)
    unquantised = (plain - images).square().mean().item()

    print("| bits per channel | MSE to the image | MSE to the VAE's image | MSE of latents | clamped |")
    print("| --- | --- | --- | --- | --- |")
    errors = []
    for bits in options.bits:
        low, high = options.range
        tokenizer = TokenBridgeTokenizer(
            vae=vae, quantizer=GaussianQuantizer(levels=2 ** bits, low=low, high=high, spread=3.0))
        decoded = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
        statistics = quantization_statistics(tokenizer, [images])
        errors.append((decoded - images).square().mean().item())
        to_plain = (decoded - plain).square().mean().item()
        print(f"| {bits} | {errors[-1]:.5f} | {to_plain:.2e} | {statistics.error:.2e} | "
              f"{statistics.outside} of {statistics.count} |", flush=True)
    print(f"| not quantised | {unquantised:.5f} | 0 | 0 | |")

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(options.bits, errors, marker="o", label="quantised")
    axes.axhline(unquantised, linestyle="--", color="gray", label="the VAE alone")
    axes.set(xlabel="bits per channel", ylabel="held-out MSE (images in [-1, 1])", yscale="log", xticks=options.bits,
             title=f"{options.run.name}: {len(images)} held-out images")
    axes.legend()
    axes.grid(alpha=0.3)
    path = options.out or options.run / "bits.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"curve: {path}")


if __name__ == "__main__":
    main()
