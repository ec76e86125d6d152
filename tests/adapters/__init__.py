"""Adapters from golden cases to varzoo. A module's `KINDS` maps "SYSTEM/CASE" to a function Case -> outputs by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from tests.golden_case import Case


def all_kinds() -> dict[str, Callable[[Case], dict[str, Any]]]:
    """The kinds of every adapter module."""
    kinds: dict[str, Callable[[Case], dict[str, Any]]] = {}
    for module in pkgutil.iter_modules(__path__):
        kinds |= importlib.import_module(f"{__name__}.{module.name}").KINDS
    return kinds
