"""Every golden case below --goldens DIR is one test, driven by its two files alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.golden_case import compare, load_case


def test_golden(golden_path: Path) -> None:
    case = load_case(golden_path)
    module = f"tests.adapters.{case.system}"
    assert importlib.util.find_spec(module), f"no system {case.system!r} is implemented"
    kinds = importlib.import_module(module).KINDS
    assert case.kind in kinds, f"{case.system} has no component {case.kind!r}; implemented: {sorted(kinds)}"
    compare(case, kinds[case.kind](case))
