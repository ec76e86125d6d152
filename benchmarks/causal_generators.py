"""Speed of drawing: causal generators against raster LlamaGen, by the sampler that everything uses.

    python benchmarks/causal_generators.py [--systems llamagen nar token_shuffle] [--size b] [--grid 16 16]
        [--batches 1 4] [--guidance 2] [--repeats 1] [--threads 2] [--device cpu] [--dtype float32] [--compile]

Random weights of published sizes, class-conditional, guided. In every repeat the systems take turns, so that other load
on the machine meets all of them; the fastest repeat counts. Prints a table for every batch size: AR steps, seconds per
batch, images per second, and how many times the images per second of the first row: on a CPU, the first system with
every product taken as `nn.Linear` takes it, which is what published code does.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

from varzoo.core.draws import Draws
from varzoo.core.steps import Constant
from varzoo.generators.base import Condition
from varzoo.generators.causal import CausalGenerator
from varzoo.loading import build, compose_config
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.llama import LlamaStack
from varzoo.samplers import Autoregressive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["llamagen", "nar", "token_shuffle"])
    parser.add_argument("--size", default="b", help="as in the names of the generator configs")
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16], metavar=("H", "W"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guidance", type=float, default=2.0, help="constant scale; 1 draws without a null branch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the stack; its first runs are not counted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    models = {name: make(f"{name}_{options.size}", options.grid, options.device, getattr(torch, options.dtype))
              for name in options.systems}
    if options.device == "cpu":
        models = {f"{options.systems[0]}, nn.Linear": plain(models[options.systems[0]]), **models}
    if options.compile:
        for model in models.values():
            compile_stacks(model)
    print(f"{options.device}, {options.dtype}{', compiled' if options.compile else ''}, {options.threads} threads, "
          f"torch {torch.__version__}, size {options.size}, guidance {options.guidance:g}, {options.grid[0]} x "
          f"{options.grid[1]} tokens")
    for batch in options.batches:
        sampler = Autoregressive(guidance=Constant(options.guidance))
        for model in models.values():
            warm_up(model, sampler, batch, whole=options.compile or options.device != "cpu")
        runs = [{name: seconds(model, sampler, batch) for name, model in models.items()}
                for _ in range(options.repeats)]
        best = {name: min(run[name] for run in runs) for name in models}
        baseline = next(iter(best.values()))
        print(f"\nbatch {batch}\n{'system':>21} {'parameters':>11} {'steps':>6} {'s / batch':>10} {'images / s':>11} "
              f"{'times':>6}")
        for name, model in models.items():
            parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            print(f"{name:>21} {parameters:10.1f}M {len(model.order.steps):6d} {best[name]:10.3f} "
                  f"{batch / best[name]:11.3f} {baseline / best[name]:6.2f}", flush=True)


def make(name: str, grid: list[int], device: str, dtype: torch.dtype) -> CausalGenerator:
    """A generator of random weights; those that begin at zero, as heads do, are random too."""
    overrides = [f"generator={name}", f"generator.spec.shape={grid}", "checkpoint=none"]
    model = build(compose_config("sample", overrides).generator).to(device).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.to(dtype)
    return model


def plain(model: CausalGenerator) -> CausalGenerator:
    """A copy of a model, with the same weights in memory, whose products are all those of `nn.Linear`."""
    copied = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    for module in copied.modules():
        for name, layer in module.named_children():
            if isinstance(layer, FewRowsLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                linear.weight = layer.weight
                setattr(module, name, linear)
    return copied


def compile_stacks(model: CausalGenerator) -> None:
    """Compile for any number of tokens fed and of slots filled."""
    torch._dynamo.config.cache_size_limit = 64  # prefix, one token and several, for each system
    for module in model.modules():
        if isinstance(module, LlamaStack):
            module.compile(dynamic=True)


def condition(model: CausalGenerator, batch: int) -> Condition:
    return Condition.classes(torch.arange(batch) % model.num_classes)


@torch.inference_mode()
def warm_up(model: CausalGenerator, sampler: Autoregressive, batch: int, whole: bool) -> None:
    """Draw before it counts: everything, twice, where something is compiled or set up; else a few steps."""
    draws = draws_for(model, batch)
    if whole:
        for _ in range(2):
            sampler.sample(model, condition(model, batch), draws)
        return
    decoding = model.begin(condition(model, batch), draws=draws, guidance=sampler.guidance)
    for step in decoding.steps:
        if step.index == 3:
            break
        decoding.commit(step, decoding.predict(step).draw(draws).tokens)


@torch.inference_mode()
def seconds(model: CausalGenerator, sampler: Autoregressive, batch: int) -> float:
    """Time of one batch, from the condition to the tokens on the host."""
    start = time.perf_counter()
    sampler.sample(model, condition(model, batch), draws_for(model, batch)).tokens.cpu()  # waits for an accelerator
    return time.perf_counter() - start


def draws_for(model: CausalGenerator, batch: int) -> Draws:
    return Draws(0, range(batch), device=str(next(model.parameters()).device))


if __name__ == "__main__":
    main()
