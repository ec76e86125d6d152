"""Packages of the extra `[text]`, imported where they are used, so that class-conditional work needs none of them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str) -> ModuleType:
    """Import a package of the extra. Raises ImportError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"text conditioning needs {package}, which is not installed: pip install 'varzoo[text]'. (Text features "
            "made elsewhere do without: features=FILE.safetensors.)", name=package) from None
