"""The leaderboard as one HTML file: no other file, no network. Sorting and filters are kept in the address, so that a
view can be linked to: leaderboard.html#sort=fd&family=MAR."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from varzoo.cli.rows import METRICS

# key, heading, whether it sorts as a number
COLUMNS = (("title", "model", False), ("family", "family", False), ("parameters", "parameters", True),
           ("tokenizer", "tokenizer", False), ("steps", "steps", False), ("protocol", "protocol", False),
           *((key, name, True) for key, name in METRICS.items()), ("measured", "measured distance", True),
           ("verdict", "verdict", False), ("samples", "samples", False), ("command", "command", False))
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
p { margin: .3rem 0 1rem; opacity: .75; max-width: 60rem; }
.filters { display: flex; gap: 1rem; flex-wrap: wrap; margin-bottom: .8rem; align-items: center; }
.filters input, .filters select { font: inherit; padding: .25rem .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
th { position: sticky; top: 0; background: Canvas; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid Highlight; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.protocol { text-decoration: underline dotted; cursor: help; }
tr:hover td { background: #8881; }
.good { color: #1a7f37; } .bad { color: #c93c37; }
@media (prefers-color-scheme: dark) { .good { color: #57ab5a; } .bad { color: #f47067; } }
code { font-size: .85em; overflow-wrap: anywhere; }
summary { cursor: pointer; }
details img { max-width: 32rem; display: block; margin-top: .4rem; image-rendering: pixelated; }
"""

SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const family = document.querySelector("#family"), text = document.querySelector("#text");
const state = new URLSearchParams(location.hash.slice(1));
function cell(row, key) { return row.querySelector(`td[data-key="${key}"]`); }
function apply() {
  const key = state.get("sort"), falling = state.get("order") === "falling";
  for (const head of table.tHead.rows[0].cells) {
    head.removeAttribute("aria-sort");
    if (head.dataset.key === key) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  }
  if (key) {
    const numeric = table.querySelector(`th[data-key="${key}"]`)?.dataset.numeric === "true";
    const raw = row => cell(row, key)?.dataset.value ?? "";
    const value = row => numeric && raw(row) ? Number(raw(row)) : raw(row);
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is empty comes last either way
      const order = numeric ? x - y : x.localeCompare(y);
      return falling ? -order : order;
    });
    body.append(...rows);
  }
  const wanted = state.get("family") ?? "", words = (state.get("text") ?? "").toLowerCase();
  let shown = 0;
  for (const row of body.rows) {
    row.hidden = (wanted && row.dataset.family !== wanted) || !row.textContent.toLowerCase().includes(words);
    shown += !row.hidden;
  }
  family.value = wanted; text.value = state.get("text") ?? "";
  document.querySelector("#shown").textContent = `${shown} of ${body.rows.length} rows`;
}
function set(name, value) {
  value ? state.set(name, value) : state.delete(name);
  history.replaceState(null, "", "#" + state);
  apply();
}
for (const head of table.tHead.rows[0].cells) head.querySelector("button").addEventListener("click", () => {
  const again = state.get("sort") === head.dataset.key && state.get("order") !== "falling";
  state.set("sort", head.dataset.key);
  set("order", again ? "falling" : "");
});
family.addEventListener("change", () => set("family", family.value));
text.addEventListener("input", () => set("text", text.value));
apply();
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the leaderboard.

    Attributes:
        family, title, parameters, tokenizer, steps: what was measured.
        protocol: its name; protocol_fields: all of it, as text.
        published, measured: values by metric of `METRICS`.
        metric: what the Fréchet distance is called.
        verdict: of the comparison, empty where there is none.
        command: how to get the row.
        source: of the published values.
        grid: a picture of samples as PNG, None where there is none.
    """

    family: str
    title: str
    parameters: str
    tokenizer: str
    steps: str
    protocol: str
    protocol_fields: str
    published: dict[str, float]
    measured: dict[str, float]
    metric: str
    verdict: str
    command: str
    source: str
    grid: bytes | None = None


def page(entries: Sequence[Entry]) -> str:
    """The whole page."""
    heads = "".join(f'<th data-key="{key}" data-numeric="{str(numeric).lower()}"><button>{escape(name)}</button></th>'
                    for key, name, numeric in COLUMNS)
    families = "".join(f"<option>{escape(name)}</option>" for name in sorted({entry.family for entry in entries}))
    rows = "\n".join(map(line, entries))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>varzoo leaderboard</title><style>{STYLE}</style></head><body>
<h1>varzoo leaderboard</h1>
<p>FID, IS, precision and recall are as published. What was measured here stands in the column after them, under its own
name. Values are comparable only within one protocol; point at a protocol to see all of it.</p>
<div class="filters"><label>family <select id="family"><option value="">all</option>{families}</select></label>
<label>search <input id="text" type="search"></label><span id="shown"></span></div>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div><script>{SCRIPT}</script></body></html>
"""


def line(entry: Entry) -> str:
    """One row of the table."""
    cells = [plain(key, getattr(entry, key)) for key in ("title", "family")]
    cells += [number("parameters", entry.parameters, size_of(entry.parameters))]
    cells += [plain(key, getattr(entry, key)) for key in ("tokenizer", "steps")]
    cells += [f'<td data-key="protocol" data-value="{escape(entry.protocol)}" class="protocol" '
              f'title="{escape(entry.protocol_fields)}">{escape(entry.protocol)}</td>']
    cells += [number(key, f"{entry.published[key]:g}" if key in entry.published else "", entry.published.get(key),
                     hint=entry.source) for key in METRICS]
    distance = entry.measured.get("fd")
    others = ", ".join(f"{METRICS[key]} {value:.4g}" for key, value in entry.measured.items() if key != "fd")
    cells += [number("measured", "" if distance is None else f"{entry.metric} {distance:.4g}", distance, hint=others)]
    tone = {"reproduced": "good"}.get(entry.verdict, "bad" if "not reproduced" in entry.verdict else "")
    cells += [plain("verdict", entry.verdict, tone)]
    picture = "" if entry.grid is None else (
        '<details><summary>grid</summary><img alt="samples" src="data:image/png;base64,'
        f'{base64.b64encode(entry.grid).decode()}"></details>')
    cells += [f'<td data-key="samples" data-value="{"1" if picture else ""}">{picture}</td>']
    command = f"<details><summary>show</summary><code>{escape(entry.command)}</code></details>" if entry.command else ""
    cells += [f'<td data-key="command" data-value="{escape(entry.command)}">{command}</td>']
    return f'<tr data-family="{escape(entry.family)}">{"".join(cells)}</tr>'


def plain(key: str, text: str, tone: str = "") -> str:
    return f'<td data-key="{key}" data-value="{escape(text)}" class="{tone}">{escape(text)}</td>'


def number(key: str, text: str, value: float | None, hint: str = "") -> str:
    return (f'<td data-key="{key}" data-value="{"" if value is None else value}" class="number" title="{escape(hint)}">'
            f"{escape(text)}</td>")


def size_of(text: str) -> float | None:
    """"208M" -> 208e6."""
    return float(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else None
