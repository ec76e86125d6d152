"""What a ragged batch of prefixes costs to decode, beside the same batch padded, full, and singly; on the CPU.

    python benchmarks/ragged_decode.py [--tokenizer flextok_tiny] [--batch 16] [--repeats 5]

Random weights: only time is measured, the least of the repeats. "padded": every row has the longest row's length.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from varzoo.core.draws import Draws
from varzoo.loading import build, compose_config


def least(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="flextok_tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = build(compose_config("sample", [f"tokenizer={options.tokenizer}", "checkpoint=none"]).tokenizer).eval()
    spec, batch = tokenizer.spec, options.batch
    ids, draws = torch.randint(spec.size, (batch, spec.length)), Draws(0, range(batch))
    lengths = torch.linspace(1, spec.length // 2, batch).long()
    longest = int(lengths.max())

    def decode(tokens: object, draws: Draws = draws) -> object:
        return tokenizer.decode_latents(tokens, draws, steps=options.steps)

    ragged = [row[:length] for row, length in zip(ids, lengths.tolist())]
    seconds = {
        "padded": least(lambda: decode(ids[:, :longest]), options.repeats),
        "ragged": least(lambda: decode(ragged), options.repeats),
        f"full ({spec.length} tokens)": least(lambda: decode(ids), options.repeats),
        "singly": least(lambda: [decode(row[None], draws.rows([i])) for i, row in enumerate(ragged)], options.repeats),
    }
    print(f"{options.tokenizer}, {batch} prefixes of 1 to {longest} tokens, {options.steps} guided steps")
    print("| batch | seconds | of padded |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / seconds['padded']:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
