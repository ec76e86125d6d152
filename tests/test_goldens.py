"""Every golden case below --goldens DIR is one test, driven by its two files alone."""

from __future__ import annotations

from pathlib import Path

from tests.adapters import all_kinds
from tests.golden_case import compare, load_case


def test_golden(golden_path: Path) -> None:
    case = load_case(golden_path)
    kinds, kind = all_kinds(), f"{case.system}/{case.kind}"
    assert kind in kinds, f"no component {kind!r} is implemented; implemented: {sorted(kinds)}"
    compare(case, kinds[kind](case))
