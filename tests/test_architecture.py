"""Imports go one way, and docs/architecture.md says which."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.doc_blocks import blocks_of
from tests.import_graph import ENTRIES, imports, mermaid, modules, package, package_edges, reduced

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def rooms() -> dict[str, int]:
    """Packages of the page's table, with the number of their row."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text().split("## Rooms")[1].split("## ")[0], re.MULTILINE)
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}


def test_the_table_names_every_package_once() -> None:
    assert rooms().keys() == {package(module) for module in modules().keys() - set(ENTRIES)}


def test_no_import_goes_up_in_the_table() -> None:
    row = rooms()
    upwards = [f"{name} imports {other}" for name, others in package_edges().items() for other in others
               if row[other] > row[name]]
    assert not upwards


def test_modules_do_not_import_in_a_circle() -> None:
    TopologicalSorter({module: {source for source, _ in pairs} for module, pairs in imports().items()}).prepare()


def test_what_is_private_stays_in_its_module() -> None:
    private = [f"{module} imports {source}.{name}" for module, pairs in imports().items() for source, name in pairs
               if name.startswith("_")]
    assert not private


def test_the_picture_is_of_today() -> None:
    (picture,) = (block.text for block in blocks_of(PAGE) if block.language == "mermaid")
    assert picture == mermaid(), "python -m tests.import_graph prints the block as it must be"


def test_the_graph_loses_only_what_a_longer_way_implies() -> None:
    assert reduced({"a": {"b", "c"}, "b": {"c"}}) == {"a": {"b"}, "b": {"c"}}
    with pytest.raises(ValueError, match="cycle"):
        reduced({"a": {"b"}, "b": {"a"}})
