"""Solver steps that anneal over the AR steps (DiSA), beside constant ones, on a generator trained on digits.

    python benchmarks/annealing.py runs/digits_xar --settings 50 50:15 50:5 15 --rounding xar
    python benchmarks/annealing.py runs/digits_mar --settings 16@50 16@50:5 8@25

A setting is [AR STEPS@]SOLVER STEPS[:LAST SOLVER STEPS]; AR steps are for generators that leave them open. Any run of
train.py will do whose generator has an iterative head. Every setting draws the same images (same seeds, classes and
noise), in turns over the seeds so that other load on the machine meets all alike. Prints the evaluations of backbone
and head per batch, the least seconds per image over the seeds, and fd_digits against the training digits and label
accuracy, each as mean +- standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from varzoo.core.steps import ANNEALING, ROUNDING, Anneal
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.score import Samples, dataset_samples, reference_statistics, score
from varzoo.loading import Model, build, compose_config, load
from varzoo.samplers import Autoregressive, Counts


@dataclass
class Row:
    """What one setting gave over the seeds."""

    setting: str
    model: Model
    counts: Counts | None = None
    seconds: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        spread = lambda values: f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}"  # noqa: E731
        ar_steps, _, solver_steps = self.setting.rpartition("@")
        return (f"| {ar_steps or self.counts.steps} | {solver_steps.replace(':', ' -> ')} | "
                f"{self.counts.backbone_evaluations} | {self.counts.head_evaluations} | "
                f"{min(self.seconds):.3f} | {spread(self.distances)} | {spread(self.accuracies)} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--law", choices=sorted(ANNEALING), default="linear")
    parser.add_argument("--rounding", choices=sorted(ROUNDING), default="mar")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overrides", nargs="*", default=[], help="of the run's sampler, as sample.py takes them")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a spread needs at least 2 seeds")
    torch.set_num_threads(options.threads)

    trained = load(options.run, overrides=options.overrides)
    rows = [Row(setting, with_steps(trained, setting, options.law, options.rounding)) for setting in options.settings]
    extractor = ClassifierFeatures(dataset="digits")
    reference = reference_statistics(dataset_samples(build(compose_config("train", []).data.train)),
                                     extractor=extractor)
    labels = [label for label in range(10) for _ in range(options.per_class)]
    for seed in range(options.seeds):
        for row in rows:
            images, row.counts = row.model.sample(labels, seed=seed)
            drawn = Samples(images.cpu(), torch.tensor(labels), torch.arange(len(labels)))
            scores = score([drawn], count=len(labels), reference=reference, extractor=extractor)
            row.seconds.append(row.counts.seconds / len(labels))
            row.distances.append(scores.fd)
            row.accuracies.append(100 * scores.accuracy)
            print(f"seed {seed}, {row.setting}: {row.seconds[-1]:.3f} s per image, fd_digits {scores.fd:.2f}, label "
                  f"accuracy {100 * scores.accuracy:.1f} %", file=sys.stderr, flush=True)
    print(f"{options.run.name}: {len(labels)} images x {options.seeds} seeds, guidance {trained.sampler.guidance}")
    columns = ("AR steps", "solver steps", "backbone evaluations", "head evaluations", "s per image", "fd_digits",
               "label accuracy")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    print("\n".join(map(str, rows)))


def with_steps(model: Model, setting: str, law: str, rounding: str) -> Model:
    """The model with another number of solver steps, and of AR steps where the setting names one."""
    ar_steps, _, solver_steps = setting.rpartition("@")
    upper, _, lower = solver_steps.partition(":")
    steps = Anneal(int(upper), int(lower), law, rounding) if lower else int(upper)
    sampler = model.sampler
    plan = replace(sampler.plan, steps=int(ar_steps)) if ar_steps else sampler.plan
    return replace(model, sampler=Autoregressive(guidance=sampler.guidance, plan=plan,
                                                 draw=sampler.draw | {"steps": steps}))


if __name__ == "__main__":
    main()
