"""Speed of xAR's decoding against the straightforward loop, which computes both branches at every evaluation.

    python benchmarks/xar_decoding.py [--model xar_b] [--batch 1] [--steps 10] [--repeats 3] [--threads 1]
                                      [--device cpu]

Random weights, published size, linear guidance. The straightforward loop is the official one in its structure: cells in
order, a cache that takes a finished cell with the first evaluation of the next, null half and modulation computed at
every evaluation. Both draw the same images, in turns so that other load on the machine meets both. Prints the best
seconds of each, the ratio of every repeat, and the largest difference relative to the largest value.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor

from varzoo.core.draws import Draws
from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Condition
from varzoo.generators.xar import XAR
from varzoo.loading import build, compose_config
from varzoo.nn.flow import EulerMaruyama
from varzoo.samplers import Autoregressive

SOLVER = EulerMaruyama()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xar_b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = compose_config("sample", [f"model={options.model}", "checkpoint=none"])
    model, guidance = build(config.generator).to(options.device).eval(), build(config.sampler).guidance
    condition = Condition.classes(torch.arange(options.batch)).to(options.device)
    draws = Draws(0, tuple(range(options.batch)), options.device)
    sampler = Autoregressive(guidance=guidance, draw={"steps": options.steps, "solver": SOLVER})
    ways = {"straightforward": lambda: straightforward(model, condition, draws, guidance, options.steps),
            "ours": lambda: sampler.sample(model, condition, draws).tokens}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        results = []
        for name, draw in ways.items():
            begun = time.perf_counter()
            results.append(draw().cpu())  # waits for an accelerator
            seconds[name].append(time.perf_counter() - begun)
    ratios = [before / after for before, after in zip(*seconds.values())]
    difference = (results[0] - results[1]).abs().max() / results[0].abs().max()
    print(f"{options.model}, batch {options.batch}, {options.steps} solver steps per cell, {options.threads} thread(s)")
    print("  ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items()))
    print(f"ratio {min(seconds['straightforward']) / min(seconds['ours']):.3f} of the best, "
          f"{', '.join(f'{ratio:.3f}' for ratio in ratios)} by repeat; difference {difference:.1e}")


@torch.no_grad()
def straightforward(model: XAR, condition: Condition, draws: Draws, guidance: Schedule, steps: int) -> Tensor:
    """Tokens `[B, N, C]`, both branches computed throughout."""
    layout, size, batch = model.layout, (model.spec.size,), condition.size
    vectors = torch.cat([model.class_vectors(condition), model.class_vectors(Condition.nothing(batch))])[:, None]
    cache, device = model.backbone.new_cache(2 * batch), vectors.device
    sequence = torch.zeros(batch, model.spec.length, model.spec.size, device=device)

    def evaluate(step: Step, x: Tensor, time: Tensor, context: int) -> Tensor:
        """Velocities `[2 B, n, C]` of a cell, the cell before it fed as well where `context` says how long it is."""
        start, stop = layout.bounds[step.index]
        slots, mask, groups = slice(start - context, stop), None, None
        if context:
            time, mask = torch.cat([torch.zeros(1), time.float()]), model.visible[slots, :stop]
            groups = (model.turn[slots] == step.index).long()
        fed = torch.cat([sequence[:, start - context:start], x.float()], dim=1).repeat(2, 1, 1)
        modulations = model.backbone.modulations(vectors + model.time_vectors(time))
        cache.reach = stop
        hidden = model.backbone(model.backbone.token_embed(fed), modulations, slots=slots, groups=groups, mask=mask,
                                cache=cache)
        return model.head(hidden)[:, context:]

    def guided(step: Step, x: Tensor, times: Tensor, k: int) -> Tensor:
        context = layout.sizes[step.index - 1] if k == 0 < step.index else 0
        conditional, null = evaluate(step, x, times[k:k + 1], context).double().chunk(2)
        scale = guidance(step)
        return null + scale * (conditional - null) if scale > 1 else conditional

    for step, slots in zip(layout.steps(batch, device), layout.bounds):
        noise = partial(draws.normal, "step_noise", size, at=step.positions, dtype=torch.float64)
        solved = SOLVER.solve(
            lambda times, step=step: lambda x, k: guided(step, x, times, k),
            draws.normal("init_noise", size, at=step.positions), lambda k, noise=noise: noise(k=k), steps=steps)
        sequence[:, slice(*slots)] = solved.sample.float()
    return layout.merge(sequence)


if __name__ == "__main__":
    main()
