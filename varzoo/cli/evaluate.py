"""Score samples, make references, reproduce published rows, render the leaderboard: `python -m varzoo.eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from varzoo.cli.leaderboard import render
from varzoo.cli.measuring import Images, Pass, make_extractor, measured
from varzoo.cli.options import Options, parse
from varzoo.cli.processes import Processes, joined
from varzoo.cli.reconstruct import reconstruct
from varzoo.cli.reproduce import reproduce
from varzoo.cli.score import score_files
from varzoo.eval.protocol import EvalProtocol, find_protocol


def main(arguments: list[str]) -> Any:
    """Do as told on the command line. Returns the row, or the path that was written."""
    options = parse(arguments)
    if options.job == "leaderboard":
        return render(options)
    with joined(options["device"]) as processes:
        if options.job == "build":
            return build_reference(options, processes)
        if options.job == "reconstruct":
            return reconstruct(options, processes)
        if options.job == "reproduce":
            return reproduce(options, processes)
        asked = named_protocol(options)
        return score_files(options, processes, asked)


def named_protocol(options: Options) -> EvalProtocol | None:
    name = options.get("protocol")
    return find_protocol(name) if name else None


def build_reference(options: Options, processes: Processes) -> Path:
    """Statistics of a data set, or of files, as a reference file."""
    asked = named_protocol(options)
    images = Images.find(options, options["data"], options.get("reference_type"))
    extractor = make_extractor(options, asked).to(processes.device)
    folder = Path(options["out"]).with_suffix(".features")
    pass_ = Pass(folder=str(folder), identity="", processes=processes)
    biased = asked is not None and asked.covariance == "biased"
    reference = measured(images, extractor, processes, folder, features=options.flag("features"), biased=biased)
    if processes.first:
        reference.save(options["out"])
        print(f"{reference.name}, {reference.kind}, by {extractor.name}: {options['out']} [{reference.hash}]")
    pass_.finish()
    return Path(options["out"])


def run(arguments: list[str]) -> None:
    """As a command: one line instead of a trace for what the user can mend."""
    try:
        main(arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
