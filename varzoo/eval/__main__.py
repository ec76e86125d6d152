"""python -m varzoo.eval samples=DIR|FILE.npz reference=NAME|STATS.npz|DIR extractor=NAME [option=value ...]

Scores samples and appends a row to a results file. Options:

    samples      a folder of images, or an .npz with arr_0
    reference    digits | digits_train | fashion_mnist | fashion_mnist_train (held-out or training images), an .npz with
                 mu and sigma, or images as for samples
    extractor    digits | fashion_mnist | inception
    weights      file of the Inception weights
    download     true: fetch the Inception weights if they are nowhere
    root         where Fashion-MNIST lies
    labels       file with one class per line, for samples that do not carry theirs
    splits       splits of the inception score (10)
    batch_size   images per batch (64)
    device       cpu | cuda | ... (cpu)
    results      file that the row is appended to (results.jsonl)
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from varzoo.core.errors import unknown
from varzoo.data.datasets import Digits, FashionMNIST
from varzoo.eval.features import ClassifierFeatures, FeatureExtractor, InceptionFeatures
from varzoo.eval.moments import Gaussian
from varzoo.eval.protocol import append_row, result_row
from varzoo.eval.score import dataset_samples, make_protocol, reference_statistics, score
from varzoo.eval.writers import SampleReader

REQUIRED = ("samples", "reference", "extractor")
DEFAULTS = {"weights": None, "download": "false", "root": None, "labels": None, "splits": "10", "batch_size": "64",
            "device": "cpu", "results": "results.jsonl"}


def main(arguments: list[str]) -> dict:
    """Score as told on the command line; returns the row. Raises ValueError for options it does not know."""
    options = parse(arguments)
    begun = time.perf_counter()
    splits = _whole(options, "splits")
    samples = SampleReader(path=options["samples"], labels=read_labels(options["labels"]),
                           batch_size=_whole(options, "batch_size"))
    extractor = make_extractor(options).to(options["device"])
    reference, name = read_reference(options, extractor)
    manifest = samples.manifest
    count = manifest.get("count", len(samples))  # a run that stopped early is refused, not scored as if it were whole
    protocol = make_protocol(
        extractor=extractor, count=count, reference=reference, reference_name=name, splits=splits,
        labels=manifest.get("label_scheme", "unknown"), uint8_rule=manifest.get("uint8_rule", "unknown"))
    scores = score(samples, count=count, reference=reference, extractor=extractor, splits=splits)
    row = result_row(protocol, asdict(scores), seconds=time.perf_counter() - begun,
                     run={"samples": str(samples.path), **manifest})
    append_row(options["results"], row)
    accuracy = "" if scores.accuracy is None else f"   class accuracy {100 * scores.accuracy:.1f} %"
    print(f"{protocol.metric} {scores.fd:.4f}   inception score {scores.inception_score:.3f} +- "
          f"{scores.inception_score_std:.3f}{accuracy}\n{protocol}\nrow appended to {options['results']}")
    return row


def parse(arguments: list[str]) -> dict[str, str | None]:
    """key=value arguments, with defaults. Raises ValueError for what is unknown, malformed or missing."""
    options: dict[str, str | None] = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"expected option=value, got {argument!r}.")
        if key not in REQUIRED and key not in DEFAULTS:
            raise unknown("option", key, (*REQUIRED, *DEFAULTS))
        options[key] = value
    if options["download"] not in ("true", "false"):
        raise unknown("download", options["download"], ("true", "false"))
    missing = [key for key in REQUIRED if not options.get(key)]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given. Usage:\n{__doc__}")
    return options


def _whole(options: dict[str, str | None], key: str) -> int:
    if not options[key].isdigit() or int(options[key]) < 1:
        raise ValueError(f"{key} must be a positive whole number, got {options[key]!r}.")
    return int(options[key])


def read_labels(path: str | None) -> list[int] | None:
    """One class per line."""
    if path is None:
        return None
    try:
        return [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"labels={path} must be a file with one class number per line ({error}).") from error


def make_extractor(options: dict[str, str | None]) -> FeatureExtractor:
    name = options["extractor"]
    if name == "inception":
        return InceptionFeatures(weights=options["weights"], download=options["download"] == "true")
    if name not in ClassifierFeatures.RECIPES:
        raise unknown("extractor", name, (*ClassifierFeatures.RECIPES, "inception"))
    if options["weights"]:
        raise ValueError(f"weights= is an option of extractor=inception; {name} trains its own classifier.")
    return ClassifierFeatures(dataset=name, root=options["root"])


def read_reference(options: dict[str, str | None], extractor: FeatureExtractor) -> tuple[Gaussian, str]:
    """The reference's statistics and what it is, in words."""
    name = options["reference"]
    split = "train" if name.endswith("_train") else "heldout"
    if name in ("digits", "digits_train"):
        dataset = Digits(split=split)
    elif name in ("fashion_mnist", "fashion_mnist_train"):
        dataset = FashionMNIST(split=split, root=options["root"])
    else:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"unknown reference {name!r}: it is neither digits, digits_train, fashion_mnist or "
                             "fashion_mnist_train, nor a file or folder.")
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                stored = "mu" in file
            if stored:
                return Gaussian.from_npz(path), f"mu and sigma of {path.name}"
        reader = SampleReader(path=path, batch_size=_whole(options, "batch_size"))
        return reference_statistics(reader, extractor=extractor), f"{len(reader)} images of {path.name}"
    samples = dataset_samples(dataset, batch_size=_whole(options, "batch_size"))
    return reference_statistics(samples, extractor=extractor), f"{len(dataset)} images of {dataset.name} {split}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
