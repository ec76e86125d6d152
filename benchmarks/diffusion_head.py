"""Speed of MAR-B's diffusion head over one draw: step by step, against modulation computed ahead.

    python benchmarks/diffusion_head.py [--rows 8 32] [--steps 100] [--repeats 3] [--threads 2] [--device cpu]

Prints, for every number of rows (guidance branches counted), the time of both in the same run, their ratio and the
largest difference of the results relative to the largest value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from varzoo.nn.diffusion import Diffusion
from varzoo.nn.diffusion_mlp import DiffusionMLP
from varzoo.nn.solvers import DDPM, Estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    head = DiffusionMLP(channels=16, out_channels=32, condition_width=768, width=1024, depth=6).to(options.device)
    for name, parameter in head.named_parameters():
        if "modulation" in name or "final" in name:  # zero at first, which would hide any difference
            torch.nn.init.normal_(parameter, std=0.01)
    print(f"{'rows':>5} {'step by step':>13} {'ahead':>9} {'ratio':>6} {'difference':>11}")
    for rows in options.rows:
        before, after, difference = compare(head, rows, options.steps, options.repeats)
        print(f"{rows:5d} {before:11.3f} s {after:7.3f} s {before / after:6.2f} {difference:11.1e}")


def compare(head: DiffusionMLP, rows: int, steps: int, repeats: int) -> tuple[float, float, float]:
    """Best seconds of both ways, taken in turns so that other load on the machine meets both, and their difference."""
    device = head.input.weight.device
    condition, initial = torch.randn(rows, 768, device=device), torch.randn(rows, head.channels, device=device)
    seconds: dict[str, list[float]] = {"naive": [], "planned": []}
    for _ in range(repeats):
        start = time.perf_counter()
        reference = sample(naive(head, condition), initial, steps)
        middle = time.perf_counter()
        ours = sample(planned(head, condition), initial, steps)
        seconds["naive"].append(middle - start)
        seconds["planned"].append(time.perf_counter() - middle)
    difference = (ours - reference).abs().max() / reference.abs().max()
    return min(seconds["naive"]), min(seconds["planned"]), difference.item()


def naive(head: DiffusionMLP, condition: Tensor) -> Callable[[Tensor], Estimate]:
    """The whole network at every step."""
    def network_at(times: Tensor) -> Estimate:
        return lambda x, k: head(x, times[k].expand(len(x)), condition).chunk(2, dim=-1)
    return network_at


def planned(head: DiffusionMLP, condition: Tensor) -> Callable[[Tensor], Estimate]:
    """What `DiffusionPrediction` does."""
    def network_at(times: Tensor) -> Estimate:
        network = head.at(times, condition)
        return lambda x, k: network(x, k).chunk(2, dim=-1)
    return network_at


@torch.inference_mode()
def sample(network_at: Callable[[Tensor], Estimate], initial: Tensor, steps: int) -> Tensor:
    solved = DDPM().solve(network_at, Diffusion.named("cosine", 1000), initial, lambda k: initial, steps=steps,
                          temperature=1.0)
    return solved.sample.cpu()  # waits for an accelerator


if __name__ == "__main__":
    main()
