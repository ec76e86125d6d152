"""Draw, score and judge a published row: `python -m varzoo.eval reproduce=mar_b ...`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from varzoo.cli.drawing import PRECISIONS, describe, place
from varzoo.cli.measuring import find_reference, make_extractor
from varzoo.cli.options import Options
from varzoo.cli.processes import Processes
from varzoo.cli.rows import Row, load_row, verdicts
from varzoo.cli.score import score_files, splits_of
from varzoo.eval.protocol import agree
from varzoo.eval.readers import SampleReader
from varzoo.eval.writers import PNGFolder, save_grid
from varzoo.loading import Model, from_config
from varzoo.sampling import Request, draw

GRID = 8  # images per side of the picture beside the samples


def reproduce(options: Options, processes: Processes) -> dict[str, Any]:
    """Draw and score a published row; prints expected, measured and verdict, and returns the row of results.

    Raises:
        ValueError: count, labels, reference or extractor are not the protocol's and not allowed to differ; this is
            found before anything is drawn.
    """
    overrides = options["override"].split()
    row, config = load_row(options["reproduce"], overrides)
    config.download, config.seed = options.flag("download"), int(options["seed"])
    published = row.asked.count
    assert published is not None, "every row says how many samples there are"
    count = options.whole("count") if options.get("count") else published
    extractor = make_extractor(options, row.asked)
    source = find_reference(options, processes, Path(options["out"]))
    model = place(from_config(config, options.get("checkpoint"), options.get("tokenizer_checkpoint")), processes.device,
                  PRECISIONS[config.precision])
    classes = model.generator.num_classes
    assert classes is not None, "every row is of a class-conditional model"
    request, scheme = requested(row, classes, count, config.seed)
    planned = replace(
        row.asked, metric=extractor.metric, extractor=extractor.name, extractor_hash=extractor.weights_hash(),
        extractor_resize=extractor.resize, count=count, labels=scheme, uint8_rule=model.tokenizer.uint8_rule,
        resize=model.resize, reference_type=source.kind,
        is_splits=splits_of(row.asked.is_formula, count, row.asked.is_splits))
    agree(row.asked, planned, options.names("allow"))
    draw_row(options, processes, config, model, request, scheme)
    processes.wait()
    scoring = options.of_job("score", samples=options["out"], state=f"{options['out']}.scoring")
    result = score_files(scoring, processes, row.asked, row=row.name, seed=config.seed, override=overrides,
                         grid=str(grid_path(options["out"])))
    if processes.first:
        report(row, result, config.precision)
    return result


def requested(row: Row, classes: int, count: int, seed: int) -> tuple[Request, str]:
    """The classes that the row's protocol draws, and what that scheme is called."""
    if row.asked.labels == "random":
        labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Request(labels=labels), "random"
    each = -(-count // classes)
    labels = [label for label in range(classes) for _ in range(each)][:count]
    return Request(labels=labels), f"{each} per label, sorted"


def draw_row(options: Options, processes: Processes, config: DictConfig, model: Model, request: Request,
             scheme: str) -> None:
    """Draw what is missing of the samples, this process its share, and a picture of some."""
    writer = PNGFolder(folder=options["out"], manifest={**describe(config, model, request), "label_scheme": scheme})
    indices = writer.missing(range(processes.rank, len(request), processes.world_size))
    for samples in draw(model, request, seed=config.seed, batch_size=options.whole("batch_size"), indices=indices,
                        progress=processes.first):
        assert samples.labels is not None  # as requested
        writer.write(samples.images, samples.numbers.tolist(), samples.labels.tolist())
    processes.wait()
    writer.close()
    if processes.first:
        spread = torch.linspace(0, len(request) - 1, min(GRID**2, len(request))).long()
        rows = len(spread) // GRID or 1
        reader = SampleReader(path=options["out"], batch_size=1)
        wanted = set(spread[:rows * (len(spread) // rows)].tolist())
        images = [batch.images for batch in reader.batches(lambda index: int(index) in wanted)]
        save_grid(grid_path(options["out"]), torch.cat(images), [""] * rows)


def grid_path(out: str) -> Path:
    return Path(f"{out}.grid.png")


def report(row: Row, result: dict[str, Any], precision: str) -> None:
    """Print expected, measured and verdict for every published value."""
    print(f"\n{row.title} ({row.paper}), protocol {row.protocol}")
    for found in verdicts(row, result):
        measured = "-" if found.measured is None else f"{found.measured:.4f}"
        print(f"  {found.metric:10} expected {found.expected.value:g} +- {found.expected.tolerance:g} "
              f"({found.expected.source})   measured {measured}   {found.verdict}")
    departures = result["protocol"]["departures"]
    print(f"  protocol fields that differ: {', '.join(departures) if departures else 'none'}")
    print(f"  beside the protocol: officially sampled in {row.sampled_in}; here in {precision} without autocast. "
          f"{row.note}".rstrip())


