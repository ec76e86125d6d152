"""Score the samples that are named on the command line, by a protocol or one of their own."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor

from varzoo.cli.measuring import Pass, find_reference, make_extractor
from varzoo.cli.options import Options
from varzoo.cli.processes import Processes
from varzoo.core.errors import unknown
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.protocol import EvalProtocol, agree, append_row, result_row
from varzoo.eval.readers import SampleReader
from varzoo.eval.reconstruction import PairScores
from varzoo.eval.score import METRICS, Samples, Scorer
from varzoo.nn.lpips import LPIPS

# What each protocol reports, beside the Fréchet distance.
REPORTS = {"adm": ("inception_score", "sfd", "precision_recall"), "torch_fidelity": ("inception_score",),
           "pytorch_fid": (), "tokenizer": ("inception_score", "pairs"), "fvd_larp": (), "fvd_styleganv": (),
           "fvd_videogpt": ()}
MORE = ("sfd", "precision_recall", "kid", "pairs")


def score_files(options: Options, processes: Processes, asked: EvalProtocol | None, **about: Any) -> dict[str, Any]:
    """Score the samples that are named; the first process appends the row and prints it.

    Args:
        asked: the protocol that this must be, None for one of its own.
        about: fields of the measurement's protocol, and of its row's `run`, that are known already.
    """
    begun = time.perf_counter()
    reader = SampleReader(path=options["samples"], labels=read_labels(options.get("labels")),
                          batch_size=options.whole("batch_size"))
    extractor = make_extractor(options, asked).to(processes.device)
    metrics = chosen_metrics(options, asked, extractor)
    draft = draft_protocol(options, reader, extractor, asked, metrics)
    count = draft.count
    assert count is not None  # the samples have been counted
    # features of both sides lie in the pass's folder
    identity = f"{reader.path} {draft.hash} {reader.batch_size} {sorted(metrics)}"
    pass_ = Pass(folder=options.get("state"), identity=identity, processes=processes)
    source = find_reference(options, processes, pass_.folder)
    draft = replace(draft, reference=source.name, reference_type=source.kind)
    allowed = options.names("allow")
    if asked is None and allowed:
        raise ValueError("allow= departs from a protocol; name it, as in protocol=adm.")
    if asked is not None:
        draft = agree(asked, draft, allowed)
    pair_scores, originals = make_pairs(options, metrics, count)
    reference = source.get(extractor, bool(metrics & {"precision_recall", "kid"}), draft.covariance == "biased")
    scorer = Scorer(
        extractor=extractor, count=count, splits=draft.is_splits, is_formula=draft.is_formula,
        metrics=metrics & set(METRICS), biased=draft.covariance == "biased", half="float16" in (draft.manifold or ""),
        features=pass_.folder / f"features_{processes.rank}.npy", kid_subsets=options.whole("kid_subsets"),
        kid_size=options.whole("kid_size"))
    go_through(reader, originals, scorer, pair_scores, pass_, processes)
    values = asdict(scorer.scores(reference, distributed=processes.many))
    values |= {} if pair_scores is None else pair_scores.result()
    protocol = replace(draft, reference_hash=reference.hash)
    row = result_row(protocol, values, seconds=time.perf_counter() - begun,
                     run={"samples": str(reader.path), **reader.manifest, **about})
    if processes.first:
        append_row(options["results"], row)
        print(f"{described(protocol, values)}\n{protocol}\nrow appended to {options['results']}")
    pass_.finish()
    return row


def go_through(reader: SampleReader, originals: SampleReader | None, scorer: Scorer, pair_scores: PairScores | None,
               pass_: Pass, processes: Processes) -> None:
    """Show all samples to the accumulators, this process its share, from where a killed pass stopped."""
    parts: dict[str, Any] = {"scorer": scorer} | ({} if pair_scores is None else {"pairs": pair_scores})
    pass_.load(parts)

    def update(samples: Samples, original: Samples | None) -> None:
        if pair_scores is not None and original is not None:
            pair_scores.update(samples.images, original.images, samples.numbers)
        scorer.update(samples)

    def mine(indices: Tensor) -> bool:  # every so-manieth batch, unless it was scored before the pass was killed
        own = int(indices[0]) // reader.batch_size % processes.world_size == processes.rank
        return own and not bool(scorer.samples.seen[indices].all())

    pass_.run(zip(reader.batches(mine), repeat(None) if originals is None else originals.batches(mine)), parts, update)
    if processes.many:
        for part in parts.values():
            part.all_reduce()


def draft_protocol(options: Options, reader: SampleReader, extractor: FeatureExtractor, asked: EvalProtocol | None,
                   metrics: set[str]) -> EvalProtocol:
    """The measurement's protocol, but for its reference."""
    manifest, formula = reader.manifest, asked.is_formula if asked else "shuffled"
    count = manifest.get("count", len(reader))  # a run that stopped early is refused, not scored as if it were whole
    return EvalProtocol(
        metric=extractor.metric, extractor=extractor.name, extractor_hash=extractor.weights_hash(), count=count,
        labels=stated(options, "label_scheme", manifest), uint8_rule=stated(options, "uint8_rule", manifest),
        reference="", reference_hash="", resize=manifest.get("resize", "none"), image_size=reader.image_size,
        extractor_resize=extractor.resize, covariance=asked.covariance if asked else "unbiased",
        is_splits=splits_of(formula, count, options.whole("splits")), is_formula=formula, frames=reader.frames,
        manifold=manifold_of(metrics, asked),
        kid=f"{options.whole('kid_subsets')} x {options.whole('kid_size')}" if "kid" in metrics else "none",
        pairs=f"SSIM 7 x 7 uniform, LPIPS {options['lpips']}" if "pairs" in metrics else "none")


def splits_of(formula: str, count: int, splits: int) -> int:
    """Splits of the inception score: ADM's are of 5000 samples each."""
    return -(-count // 5000) if formula == "consecutive" else splits


def chosen_metrics(options: Options, asked: EvalProtocol | None, extractor: FeatureExtractor) -> set[str]:
    """The protocol's metrics, or the usual two, and those that are asked for beside."""
    for name in options.names("also"):
        if name not in MORE:
            raise unknown("metric", name, MORE)
    usual = set(REPORTS[asked.family] if asked else ("inception_score",))
    if not extractor.classes:
        usual.discard("inception_score")
    if extractor.spatial_dim is None:
        usual.discard("sfd")  # of a protocol whose extractor is departed from
    return {"fd", *usual, *options.names("also")}


def manifold_of(metrics: set[str], asked: EvalProtocol | None) -> str:
    if "precision_recall" not in metrics:
        return "none"
    return (asked.manifold if asked else None) or "k=3, float32"


def stated(options: Options, name: str, manifest: dict[str, Any]) -> str:
    """What the samples' manifest says, or else the command line."""
    told, said = manifest.get(name), options.get(name)
    if told is not None and said is not None and told != said:
        raise ValueError(f"the samples' manifest says {name} {told!r}, the command line {said!r}; leave it out.")
    return told or said or "unknown"


def make_pairs(options: Options, metrics: set[str], count: int) -> tuple[PairScores | None, SampleReader | None]:
    """The accumulator of pairs, and the originals."""
    if "pairs" not in metrics:
        return None, None
    if not Path(options["reference"]).exists():
        raise ValueError("pairs of samples and originals need images as reference, in the same order; "
                         f"{options['reference']} is no file or folder.")
    reader = SampleReader(path=options["reference"], batch_size=options.whole("batch_size"))
    if len(reader) != count:
        raise ValueError(f"{count} reconstructions and {len(reader)} originals do not pair.")
    net = options["lpips"]
    return PairScores(count=count, lpips=None if net == "none" else LPIPS.pretrained(net)), reader


def read_labels(path: str | None) -> list[int] | None:
    """One class per line."""
    if path is None:
        return None
    try:
        return [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"labels={path} must be a file with one class number per line ({error}).") from error


def described(protocol: EvalProtocol, values: dict[str, Any]) -> str:
    """The scores in one line, each under the name that the protocol gives it."""
    names = {"fd": protocol.metric, "sfd": f"s{protocol.metric}", "inception_score": "inception score",
             "precision": "precision", "recall": "recall", "kid": "KID", "psnr": "PSNR", "ssim": "SSIM",
             "lpips": "LPIPS"}
    parts = []
    for key, name in names.items():
        if values.get(key) is not None:
            spread = values.get(f"{key}_std")
            parts.append(f"{name} {values[key]:.4f}" + ("" if spread is None else f" +- {spread:.3f}"))
    if values.get("accuracy") is not None:
        parts.append(f"class accuracy {100 * values['accuracy']:.1f} %")
    return "   ".join(parts)
