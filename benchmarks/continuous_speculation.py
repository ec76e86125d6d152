"""Continuous speculative decoding (CSpD) beside plain decoding, on two MARs trained on digits.

    python benchmarks/continuous_speculation.py runs/digits_mar runs/digits_mar_nano [--steps 32] [--lengths 2 4 8]

Every setting draws the same images (same seeds, classes and noise); the plain one draws a second time from other seeds,
as the measure of what chance does. Prints target and draft evaluations per batch, acceptance, seconds per image in
batches of 1 and 8 against plain decoding in the same run, fd_digits and label accuracy (mean +- deviation over the
seeds), the mean and deviation of pixels, and the p-value of a permutation test of the energy distance to the plain
images of other seeds, on the classifier's features.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from varzoo.core.steps import Anneal
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.score import Samples, dataset_samples, reference_statistics, score
from varzoo.loading import Model, build, compose_config, load, load_generator
from varzoo.samplers import Autoregressive, ContinuousSpeculative, Counts, PrefixSpeculative, Sampler
from varzoo.samplers.continuous import Acceptance


@dataclass
class Row:
    """What one sampler gave over the seeds."""

    sampler: Sampler
    counts: Counts | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def settings(options: argparse.Namespace, trained: Model) -> dict[str, Row]:
    """The samplers by name, plain decoding first."""
    draft, drawing = load_generator(options.draft), trained.sampler.draw
    common = {"guidance": trained.sampler.guidance, "plan": replace(trained.sampler.plan, steps=options.steps)}
    annealed = {**drawing, "steps": Anneal(drawing["steps"], max(1, drawing["steps"] // 3))}

    def speculative(length: int, kind: type = ContinuousSpeculative, tau: float = 42.0,
                    factor: str = "target_over_draft", draw: Mapping = drawing) -> Sampler:
        return kind(draft=draft, length=length, prefill=options.prefill, draw=draw, **common,
                    acceptance=Acceptance(tau=tau, factor=factor))

    middle = options.lengths[len(options.lengths) // 2]
    samplers = {"plain": Autoregressive(draw=drawing, **common)}
    samplers |= {f"code, length {length}": speculative(length) for length in options.lengths}
    samplers |= {f"code, length {middle}, tau 1": speculative(middle, tau=1.0),
                 f"paper, length {middle}": speculative(middle, PrefixSpeculative, 1.0, "draft_over_target"),
                 "plain, DiSA": Autoregressive(draw=annealed, **common),
                 f"code, length {middle}, DiSA": speculative(middle, draw=annealed)}
    return {name: Row(sampler) for name, sampler in samplers.items()}


def energy_test(a: Tensor, b: Tensor, classes: Tensor, permutations: int = 999) -> float:
    """p-value of equal distributions of rows `[n, F]` of the same classes `[n]`: the energy distance under
    permutations within classes, since both sets have as many of each.
    """
    generator, n = torch.Generator().manual_seed(0), len(classes)
    distances, grouped = torch.cdist(torch.cat([a, b]), torch.cat([a, b])), classes.repeat(2)
    slots = grouped.argsort(stable=True)  # places of both sets, class by class

    def energy(order: Tensor) -> float:
        shuffled = distances[order][:, order]
        return (2 * shuffled[:n, n:].mean() - shuffled[:n, :n].mean() - shuffled[n:, n:].mean()).item()

    seen, others = energy(torch.arange(2 * n)), []
    for _ in range(permutations):
        order = torch.empty_like(slots)
        order[slots] = (grouped + torch.rand(2 * n, generator=generator)).argsort()
        others.append(energy(order))
    return (1 + sum(other >= seen for other in others)) / (1 + permutations)


def timed(model: Model, labels: Sequence[int], seed: int) -> float:
    return model.sample(labels, seed=seed)[1].seconds / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--steps", type=int, default=32, help="AR steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prefill", type=float, default=0.05)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overrides", nargs="*", default=[], help="of the target's sampler, as sample.py takes them")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    torch.set_num_threads(options.threads)
    trained = load(options.target, overrides=options.overrides)
    rows = settings(options, trained)
    rows["plain, other seeds"] = Row(rows["plain"].sampler)
    extractor = ClassifierFeatures(dataset="digits")
    reference = reference_statistics(dataset_samples(build(compose_config("train", []).data.train)),
                                     extractor=extractor)
    labels = [label for label in range(10) for _ in range(options.per_class)]
    with tqdm(total=options.seeds * len(rows), desc="sampling", unit="batch") as bar:
        for seed in range(options.seeds):
            for name, row in rows.items():
                model = replace(trained, sampler=row.sampler)
                images, row.counts = model.sample(labels, seed=seed + 1000 * name.endswith("other seeds"))
                scores = score([Samples(images.cpu(), torch.tensor(labels), torch.arange(len(labels)))],
                               count=len(labels), reference=reference, extractor=extractor)
                row.images.append(images.cpu())
                row.distances.append(scores.fd)
                row.accuracies.append(100 * scores.accuracy)
                for batch in (1, 8):
                    taken = timed(model, labels[::len(labels) // batch][:batch], seed)
                    row.seconds[batch] = min(taken, row.seconds.get(batch, taken))
                bar.update()

    classes = torch.tensor(labels).repeat(options.seeds)
    others = extractor(torch.cat(rows["plain, other seeds"].images))["features"]
    print(f"{options.target.name} by {options.draft.name}: {len(labels)} images x {options.seeds} seeds, "
          f"{options.steps} AR steps, guidance {trained.sampler.guidance}")
    columns = ("sampler", "target / draft evaluations", "acceptance", "s per image, batch 1 (times plain)",
               "batch 8 (times plain)", "fd_digits", "label accuracy", "pixels", "p")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    spread = lambda values: f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}"  # noqa: E731
    for name, row in rows.items():
        pixels = torch.cat(row.images).double()
        features = extractor(torch.cat(row.images))["features"]
        p = "" if name.endswith("other seeds") else f"{energy_test(features, others, classes):.3f}"
        speeds = [f"{row.seconds[batch]:.3f} ({rows['plain'].seconds[batch] / row.seconds[batch]:.2f})"
                  for batch in (1, 8)]
        print(f"| {name} | {row.counts.backbone_evaluations} / {row.counts.draft_evaluations} | "
              f"{row.counts.acceptance_rate:.2f} | {' | '.join(speeds)} | {spread(row.distances)} | "
              f"{spread(row.accuracies)} % | {pixels.mean():.1f}, {pixels.std():.1f} | {p} |")


if __name__ == "__main__":
    main()
