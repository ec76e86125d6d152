"""Speculative samplers of a trained generator of digits: what is accepted, how fast, how good.

    python benchmarks/speculation.py RUN [--drafter RUN] [--smaller RUN] [--scale 2] [--seeds 0 1 2] [--per-class 30]

Prints a row per sampler and policy: acceptance rate, mean accepted length and target calls (rounds) per image, seconds
of plain decoding over seconds of this sampler at batch 1 and 8 (medians, measured in turn in this process), and
fd_digits with its standard deviation over sampling seeds. Needs runs of train.py; everything is drawn at one guidance
scale, unfiltered, at temperature 1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch

from varzoo.core.steps import Constant
from varzoo.demo import Judge
from varzoo.eval.score import Samples
from varzoo.generators.drafter import Drafter
from varzoo.loading import Model, compose_config, load, load_generator
from varzoo.samplers import Autoregressive, Sampler
from varzoo.samplers.speculative import (
    Additive,
    DynamicTree,
    DySpecTree,
    Eagle,
    Exact,
    Grouped,
    Jacobi,
    KSequential,
    Lantern,
    ModelDraft,
    Multiplicative,
    Sequences,
    Smaller,
    Speculative,
    StaticTree,
)

SMALL = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]  # 8 nodes: what a CPU verifies at little more cost


def samplers(scale: float, drafter: Drafter | None, smaller: Smaller | None, neighbours: Path) -> dict[str, Sampler]:
    """Everything that is compared, by the name of its row; rows of a draft model that is not given are left out."""
    guidance = Constant(scale)

    def with_(draft: ModelDraft | Jacobi, policy: object) -> Speculative:
        return Speculative(draft=draft, policy=policy, guidance=guidance, neighbours=neighbours)

    rows: dict[str, Sampler] = {"plain": Autoregressive(guidance=guidance)}
    if drafter is not None:
        rows |= by_drafter(Eagle(drafter=drafter), with_)
    if smaller is not None:
        rows["smaller, a chain of 4, exact"] = with_(ModelDraft(model=smaller, shape=Sequences(length=4)), Exact())
        rows["smaller, SpecTr 4 x 4"] = with_(ModelDraft(model=smaller, shape=Sequences(length=4, count=4)),
                                              KSequential())
    rows["SJD, window 16"] = with_(Jacobi(window=16, fill="repeat"), Exact())
    rows["SJD, window 8"] = with_(Jacobi(window=8, fill="repeat"), Exact())
    rows["GSD, window 16"] = with_(Jacobi(window=16, fill="repeat"), Grouped())
    return rows


def by_drafter(eagle: Eagle, with_: Callable[[ModelDraft, object], Speculative]) -> dict[str, Sampler]:
    def static() -> ModelDraft:
        return ModelDraft(model=eagle, shape=StaticTree(paths="naive_extend_57"))

    def dynamic() -> ModelDraft:
        return ModelDraft(model=eagle, shape=DynamicTree(top_k=10, depth=4, total=59))

    rows: dict[str, Sampler] = {
        "EAGLE-1, exact": with_(static(), Exact()),
        "EAGLE-1, 8 nodes, exact": with_(ModelDraft(model=eagle, shape=StaticTree(paths=SMALL)), Exact()),
        "EAGLE, a chain of 5, exact": with_(ModelDraft(model=eagle, shape=Sequences(length=5)), Exact()),
        "EAGLE-2, exact": with_(dynamic(), Exact()),
        "DySpec, exact": with_(ModelDraft(model=eagle, shape=DySpecTree(top_k=10, depth=4, total=59)), Exact())}
    for delta, k in ((0.05, 5), (0.2, 5), (0.4, 5)):
        for rule in ("dynamic", "paper"):
            rows[f"LANTERN, delta {delta:g}, k {k}, {rule}"] = with_(
                dynamic(), Lantern(bound=Additive(delta=delta), k=k, rule=rule))
    for factor, k in ((5.0, 10), (20.0, 5)):
        rows[f"LANTERN++, factor {factor:g}, k {k}"] = with_(
            static(), Lantern(bound=Multiplicative(factor=factor), k=k, rule="static"))
    return rows


def seconds(model: Model, batch: int, seed: int) -> float:
    _, counts = model.sample([index % 10 for index in range(batch)], seed=seed)
    return counts.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--smaller", type=Path)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of rows; plain decoding is always one")
    parser.add_argument("--neighbours", type=Path, default=None)
    options = parser.parse_args()
    plain = load(options.run)
    drafter = None if options.drafter is None else load_generator(options.drafter)
    smaller = None if options.smaller is None else Smaller(generator=load_generator(options.smaller))
    rows = {name: Model(tokenizer=plain.tokenizer, generator=plain.generator, sampler=sampler)
            for name, sampler in samplers(options.scale, drafter, smaller, options.neighbours).items()
            if name == "plain" or any(fnmatch(name, pattern) for pattern in options.only)}
    judge = Judge(compose_config("train", []), options.run, options.per_class)
    labels = [label for label in range(10) for _ in range(options.per_class)]

    times: dict[str, dict[int, float]] = {name: {} for name in rows}
    for batch in (1, 8):
        measured: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(options.repeats + 1):  # in turn, so that what disturbs one disturbs all; the first warms up
            for name, model in rows.items():
                measured[name].append(seconds(model, batch, repeat))
        times = {name: {**times[name], batch: statistics.median(values[1:])} for name, values in measured.items()}

    print("| sampler | acceptance | accepted length | rounds per image | speed-up, batch 1 | batch 8 | fd_digits | "
          "label accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, model in rows.items():
        distances, accuracies, rates, lengths, rounds = [], [], [], [], []
        for seed in options.seeds:
            images, counts = model.sample(labels, seed=seed)
            found = judge(name, [Samples(images, torch.tensor(labels), torch.arange(len(labels)))], len(labels))
            distances.append(found.fd)
            accuracies.append(found.accuracy)
            rates.append(counts.acceptance_rate)
            lengths.append(counts.mean_accepted_length)
            rounds.append(counts.verifications / len(labels))
        drafted = model.sampler.networks or isinstance(model.sampler, Speculative)
        accepted = (f"{100 * statistics.mean(rates):.0f} % | {statistics.mean(lengths):.2f} | "
                    f"{statistics.mean(rounds):.1f}") if drafted else f"- | 1 | {counts.steps}"
        faster = [f"{times['plain'][batch] / times[name][batch]:.2f}" for batch in (1, 8)]
        spread = statistics.stdev(distances) if len(distances) > 1 else float("nan")
        print(f"| {name} | {accepted} | {faster[0]} | {faster[1]} | {statistics.mean(distances):.2f} +- {spread:.2f} | "
              f"{100 * statistics.mean(accuracies):.0f} % |", flush=True)
    print(f"plain decoding: {1000 * times['plain'][1]:.0f} ms at batch 1, {1000 * times['plain'][8]:.0f} ms at batch 8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
