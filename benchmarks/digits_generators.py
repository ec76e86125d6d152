"""Trained generators of digits side by side, measured in one process.

    python benchmarks/digits_generators.py runs/digits_llamagen runs/digits_nar ... [--scale 2] [--per-class 50]

Prints a table: tokens, AR steps, milliseconds per image (a batch of 100, decoding included), fd_digits against the
training digits and label accuracy, each with its own guidance schedule at the given scale. Needs runs of train.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from varzoo.demo import Judge, guided
from varzoo.loading import compose_config, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--per-class", type=int, default=50)
    options = parser.parse_args()
    config = compose_config("train", [])
    print("| run | parameters | tokens | AR steps | ms per image | fd_digits | label accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in options.runs:
        judge, model = Judge(config, run, options.per_class), guided(load(run), options.scale)
        labels = list(range(10)) * 10
        model.sample(labels[:10])  # warm-up
        begun = time.perf_counter()
        _, counts = model.sample(labels)
        seconds = (time.perf_counter() - begun) / len(labels)
        scores = judge(run.name, judge.samples(model, options.scale), len(judge.request))
        millions = sum(parameter.numel() for parameter in model.generator.parameters()) / 1e6
        print(f"| {run.name} | {millions:.2f}M | {model.generator.spec.length} | {counts.steps} | "
              f"{1000 * seconds:.1f} | {scores.fd:.2f} | {100 * scores.accuracy:.1f} % |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
