"""Speed of drawing with MAR: the sampler that everything uses, against the straightforward loop, with equal results.

    python benchmarks/mar_decoding.py [--model mar_b] [--steps 64] [--solver-steps 100] [--anneal-to N] [--batches 1]
        [--guidance 2.9] [--repeats 1] [--threads 2] [--device cpu] [--dtype float32]

Random weights of a published size. The straightforward loop runs both branches of guidance one after the other at every
step, the decoder's last block for every position, and the whole head at every solver step. Both draw the same images;
the largest difference relative to the largest value is printed. The two take turns, the fastest repeat counts.

A second table has the cost of a solver step over that of the bare network, for the rows of an average AR step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from varzoo.core.draws import Draws
from varzoo.core.steps import Anneal, LinearInTokens, Step
from varzoo.generators.base import Condition
from varzoo.generators.mar import MAR, MARDecoding
from varzoo.generators.masked import MaskPlan
from varzoo.loading import build, compose_config
from varzoo.predictions.diffusion import DiffusionPrediction
from varzoo.samplers import Autoregressive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mar_b", help="name of a generator config")
    parser.add_argument("--steps", type=int, default=64, help="AR steps")
    parser.add_argument("--solver-steps", type=int, default=100)
    parser.add_argument("--anneal-to", type=int, help="anneal the solver steps down to this many (DiSA)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--guidance", type=float, default=2.9, help="of the linear schedule")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    model = make(options.model, options.device, getattr(torch, options.dtype))
    lower = options.anneal_to or options.solver_steps
    sampler = Autoregressive(guidance=LinearInTokens(options.guidance), plan=MaskPlan(steps=options.steps),
                             draw={"steps": Anneal(options.solver_steps, lower)})
    print(f"{options.model}, {options.device}, {options.dtype}, {options.threads} threads, torch {torch.__version__}, "
          f"{options.steps} AR steps of {options.solver_steps} to {lower} solver steps, guidance {options.guidance:g}")
    print(f"{'batch':>6} {'straightforward':>16} {'ours':>9} {'images / s':>11} {'times':>6} {'difference':>11}")
    for batch in options.batches:
        runs = [(timed(Straightforward(model), sampler, batch), timed(model, sampler, batch))
                for _ in range(options.repeats)]
        before, after = (min(run[way][0] for run in runs) for way in (0, 1))
        (_, reference), (_, ours) = runs[0]
        difference = (ours - reference).abs().max() / reference.abs().max()
        print(f"{batch:6d} {before:14.2f} s {after:7.2f} s {batch / after:11.3f} {before / after:6.2f} "
              f"{difference:11.1e}", flush=True)

    rows = round(model.spec.length / options.steps)
    print(f"\na solver step at {rows} positions per image, both branches\n"
          f"{'batch':>6} {'bare network':>13} {'solver step':>12} {'ratio':>6}")
    for batch in [*options.batches, 8]:
        bare, stepped = solver_step(model, batch, rows, options.solver_steps)
        print(f"{batch:6d} {1000 * bare:10.2f} ms {1000 * stepped:9.2f} ms {stepped / bare:6.2f}", flush=True)


def make(name: str, device: str, dtype: torch.dtype) -> MAR:
    """A generator of random weights; those that begin at zero, as the head's do, are random too."""
    model = build(compose_config("sample", [f"generator={name}", "checkpoint=none"]).generator).to(device).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
        parameter.data = parameter.data.to(dtype)
    return model


class Straightforward:
    """The same model, asked for in the plainest way; what the sampler does not look at is the model's own."""

    def __init__(self, model: MAR) -> None:
        self.model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def begin(self, *arguments: object, **keywords: object) -> MARDecoding:
        decoding = self.model.begin(*arguments, **keywords)
        decoding.__class__ = StraightforwardDecoding
        return decoding


class StraightforwardDecoding(MARDecoding):
    """Two passes of everything, then the head as it stands."""

    def predict(self, step: Step) -> DiffusionPrediction:
        model, size = self.generator, len(self.tokens)
        everywhere = torch.arange(model.spec.length, device=self.tokens.device).expand(size, -1)
        hidden = self._known.scatter(1, step.positions, False)
        visible = hidden.nonzero()[:, 1].view(size, -1)
        branches = [model.backbone(self.tokens, visible, vectors, everywhere)
                    for vectors in (self.vectors, model.null_class.expand_as(self.vectors))]
        rows = torch.stack(branches)
        at = step.positions[None, ..., None].expand(2, -1, -1, rows.shape[-1])
        head = SimpleNamespace(channels=model.head.channels,
                               at=lambda times, condition: whole_head(model.head, times, condition))
        return DiffusionPrediction(condition=rows.gather(2, at), scale=self.guidance(step), positions=step.positions,
                                   process=model.process, network=head)


def whole_head(head: nn.Module, times: Tensor, condition: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The whole head at every solver step."""
    def network(noised: Tensor, k: int) -> Tensor:
        at = times[k].expand(condition.shape[:-1])
        return head(noised.to(condition.dtype).expand(len(condition), *noised.shape), at, condition)
    return network


@torch.inference_mode()
def timed(model: MAR | Straightforward, sampler: Autoregressive, batch: int) -> tuple[float, Tensor]:
    """Seconds from the condition to the tokens on the host, and the tokens."""
    device = str(next(model.parameters()).device)
    condition, draws = Condition.classes(torch.arange(batch, device=device)), Draws(0, range(batch), device=device)
    start = time.perf_counter()
    tokens = sampler.sample(model, condition, draws).tokens.cpu()
    return time.perf_counter() - start, tokens


@torch.inference_mode()
def solver_step(model: MAR, batch: int, rows: int, steps: int) -> tuple[float, float]:
    """Seconds of one bare forward of the head, and of one solver step around it, noise drawn; the best of five."""
    device, dtype = model.null_class.device, model.null_class.dtype
    condition = torch.randn(2, batch, rows, model.head.condition_embed.in_features, device=device, dtype=dtype)
    prediction = DiffusionPrediction(
        condition=condition, scale=2.0, positions=torch.arange(rows, device=device).expand(batch, -1),
        process=model.process, network=model.head)
    draws, noised = Draws(0, range(batch), device=str(device)), torch.randn(batch, rows, model.spec.size, device=device)
    network = whole_head(model.head, torch.arange(steps, device=device), condition)
    bare, stepped = [], []
    for _ in range(5):
        start = time.perf_counter()
        for k in range(steps):
            last = network(noised, k)
        last.cpu()
        middle = time.perf_counter()
        prediction.draw(draws, steps=steps).tokens.cpu()
        bare.append((middle - start) / steps)
        stepped.append((time.perf_counter() - middle) / steps)
    return min(bare), min(stepped)


if __name__ == "__main__":
    main()
