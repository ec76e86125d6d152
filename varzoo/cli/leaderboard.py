"""The leaderboard: published rows and what was measured, as Markdown and as one page of HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from varzoo.cli.leaderboard_page import Entry, page
from varzoo.cli.options import Options
from varzoo.cli.rows import METRICS, Row, load_row, row_names, verdicts
from varzoo.core.checkpoint import atomic_path
from varzoo.eval.protocol import read_rows


def render(options: Options) -> Path:
    """Write leaderboard.md and leaderboard.html into the folder; returns the page."""
    results = Path(options["results"])
    stored = read_rows(results) if results.is_file() else []
    found = entries(stored)
    folder = Path(options["leaderboard"])
    for name, text in (("leaderboard.md", markdown(found)), ("leaderboard.html", page(found))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text)
    print(f"{len(found)} rows, {len(stored)} of them measured here: {folder / 'leaderboard.html'}")
    return folder / "leaderboard.html"


def entries(stored: list[dict[str, Any]]) -> list[Entry]:
    """Published rows, each with its newest measurement if there is one; then all other stored rows."""
    newest = {result["run"]["row"]: result for result in stored if "row" in result["run"]}
    found = [published_entry(load_row(name, [])[0], newest.get(name)) for name in row_names()]
    others = [result for result in stored if result["run"].get("row") not in row_names()]
    return [*found, *map(own_entry, others)]


def published_entry(row: Row, result: dict[str, Any] | None) -> Entry:
    """A published row beside what was measured of it."""
    judged = [] if result is None else verdicts(row, result)
    said = dict.fromkeys(found.verdict for found in judged if found.measured is not None)
    fields = {name: value for name, value in vars(row.asked).items() if value is not None} if result is None \
        else result["protocol"]
    return Entry(
        family=row.family, title=row.title, parameters=row.parameters, tokenizer=row.tokenizer, steps=row.steps,
        protocol=row.protocol, protocol_fields=listed(fields), metric="FID" if result is None else metric_of(result),
        published={name: expected.value for name, expected in row.expected.items()}, measured=values_of(result),
        verdict="; ".join(said), source=row.expected["fd"].source + (f". {row.note}" if row.note else ""),
        command=f"python -m varzoo.eval reproduce={row.name} checkpoint=FILE tokenizer_checkpoint=FILE "
                f"reference=FILE.npz out=samples/{row.name}", grid=picture(result))


def own_entry(result: dict[str, Any]) -> Entry:
    """A stored row that is none of the published ones."""
    protocol, run = result["protocol"], result["run"]
    samples = str(run.get("samples", run.get("name", "")))
    command = "" if "samples" not in run else (
        f"python -m varzoo.eval samples={Path(samples).name} reference=... "
        + (f"extractor={protocol['extractor']}" if protocol["family"] == "own" else f"protocol={protocol['family']}"))
    return Entry(
        family="own", title=Path(samples).name, parameters="", tokenizer="", steps="", protocol=protocol["family"],
        protocol_fields=listed(protocol), published={}, measured=values_of(result), metric=metric_of(result),
        verdict="", command=command, source="", grid=picture(result))


def values_of(result: dict[str, Any] | None) -> dict[str, float]:
    return {} if result is None else {name: result[name] for name in METRICS if result.get(name) is not None}


def metric_of(result: dict[str, Any]) -> str:
    return result["protocol"]["metric"]


def listed(fields: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
                     for name, value in fields.items())


def picture(result: dict[str, Any] | None) -> bytes | None:
    path = None if result is None else result["run"].get("grid")
    return Path(path).read_bytes() if path and Path(path).is_file() else None


def markdown(found: list[Entry]) -> str:
    """The leaderboard as a table. A measured distance stands under its own name, so that no proxy passes for a FID."""
    names = list(METRICS.values())
    lines = ["# Leaderboard", "", "Published values, and what was measured here.", "",
             f"| model | family | parameters | tokenizer | steps | protocol | {' | '.join(names)} | measured | "
             "verdict |",
             "|" + " --- |" * (8 + len(names))]
    for entry in found:
        values = [shown(entry.published.get(name)) for name in METRICS]
        measured = ", ".join(f"{entry.metric if name == 'fd' else METRICS[name]} {value:.4g}"
                             for name, value in entry.measured.items())
        cells = [entry.title, entry.family, entry.parameters, entry.tokenizer, entry.steps, entry.protocol, *values,
                 measured, entry.verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
