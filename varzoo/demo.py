"""The main job, end to end: train a tokenizer and a generator on real digits, draw from it, and score what it draws.

    python -m varzoo.demo [experiment=digits_llamagen] [any override of train.py]

Ends by naming the files it made: samples in rows by class, reconstructions, curves, and a table of scores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from varzoo.core.checkpoint import atomic_path
from varzoo.core.steps import with_scale
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.protocol import append_row, result_row
from varzoo.eval.score import Samples, Scores, dataset_samples, make_protocol, reference_statistics, score
from varzoo.eval.writers import save_grid
from varzoo.loading import Model, build, compose_config, load
from varzoo.sampling import Request, draw
from varzoo.training.run import train


def demo(overrides: list[str], *, per_class: int = 50,
         scales: tuple[float, ...] = (1.0, 2.0, 3.0)) -> dict[str, Scores]:
    """Train, sample and score one experiment on digits.

    Args:
        overrides: of train.py's config.
        per_class: images per class that are scored.
        scales: guidance scales; the picture is drawn at the second (or only) one.

    Returns:
        The scores by row of the table.
    """
    begun = time.perf_counter()
    config = compose_config("train", overrides)
    folder = train(config)
    judge = Judge(config, folder, per_class)
    trained = load(folder)
    torch.manual_seed(config.seed)
    untrained = replace(trained, generator=build(config.generator).eval())
    real = "real held-out images"
    table = {real: judge(real, dataset_samples(judge.heldout), len(judge.heldout))}
    for name, model in (("trained", trained), ("untrained", untrained)):
        for scale in scales:
            row = f"{name}, guidance {scale:g}"
            table[row] = judge(row, judge.samples(model, scale), len(judge.request))
    picture, scale = folder / "digits.png", scales[:2][-1]
    columns = Request(labels=[label for label in range(10) for _ in range(10)])
    images = [samples.images for samples in draw(guided(trained, scale), columns, seed=config.seed + 1, batch_size=100)]
    save_grid(picture, torch.cat(images), trained.class_names)
    report(folder, table, judge.metric)
    tokenizer_folder = Path(config.tokenizer_checkpoint)
    print(f"\ndone in {(time.perf_counter() - begun) / 60:.1f} minutes. Look at:")
    files = {picture: f"samples in rows by class, guidance {scale:g}", folder / "curve.png": "losses over the steps",
             folder / "scores.md": "the table above", folder / "results.jsonl": "its rows, each with its protocol"}
    pictures = sorted((tokenizer_folder / "samples").glob("step_*.png"))
    files |= dict.fromkeys(pictures[-1:], "originals and reconstructions")
    for path, what in files.items():
        print(f"  {path}  ({what})")
    return table


class Judge:
    """Scores images by a classifier that knows real training digits only, against statistics of those digits."""

    def __init__(self, config: DictConfig, folder: Path, per_class: int) -> None:
        self.extractor, self.results = ClassifierFeatures(dataset="digits"), folder / "results.jsonl"
        self.metric, self.seed = self.extractor.metric, config.seed
        train_set, self.heldout = build(config.data.train), build(config.data.heldout)
        self.reference = reference_statistics(dataset_samples(train_set), extractor=self.extractor,
                                              name="digits, train split", kind="train")
        self.request = Request(labels=[label for label in range(10) for _ in range(per_class)])
        self.labels = f"{per_class} per class"

    def samples(self, model: Model, scale: float) -> Iterable[Samples]:
        return draw(guided(model, scale), self.request, seed=self.seed, batch_size=250)

    def __call__(self, name: str, samples: Iterable[Samples], count: int) -> Scores:
        begun = time.perf_counter()
        scores = score(samples, count=count, reference=self.reference, extractor=self.extractor)
        protocol = make_protocol(extractor=self.extractor, count=count, reference=self.reference,
                                 labels=self.labels,
                                 uint8_rule="round" if name.startswith("real") else "the tokenizer's")
        append_row(self.results, result_row(protocol, asdict(scores), seconds=time.perf_counter() - begun,
                                            run={"name": name, "seed": self.seed}))
        return scores


def guided(model: Model, scale: float) -> Model:
    """The model with another guidance scale, its schedule kept."""
    sampler: Any = copy(model.sampler)
    sampler.guidance = with_scale(sampler.guidance, scale)
    return replace(model, sampler=sampler)


def report(folder: Path, table: dict[str, Scores], metric: str) -> None:
    """Print the table and write it as Markdown."""
    lines = [f"| images | {metric} | label accuracy | inception score |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {scores.fd:.2f} | {100 * (scores.accuracy or 0):.1f} % | {scores.inception_score:.2f} |"
              for name, scores in table.items()]
    with atomic_path(folder / "scores.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    demo(sys.argv[1:])
