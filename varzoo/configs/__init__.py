"""Hydra configs: the registry of varzoo, and the names in it."""

from __future__ import annotations

import fnmatch
import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

KINDS = ("model", "tokenizer", "generator", "sampler", "experiment")  # groups whose configs are named by users


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models (tokenizer, generator and sampler settings together) that `varzoo.load` takes."""
    return list_configs("model", pattern)


def list_configs(group: str, pattern: str = "*") -> list[str]:
    """Names of the configs of a group that a shell pattern matches; those that others are made of are left out."""
    folders = [place / group for place in places() if (place / group).is_dir()]
    names = sorted({file.name.removesuffix(".yaml") for folder in folders for file in folder.iterdir()
                    if file.name.endswith(".yaml")})
    return [name for name in names if fnmatch.fnmatch(name, pattern) and not name.startswith("_")]


def text_of(group: str, name: str) -> str:
    """A config as it is written. Raises FileNotFoundError if there is none of this name."""
    for place in places():
        file = place / group / f"{name}.yaml"
        if file.is_file():
            return file.read_text()
    raise FileNotFoundError(f"there is no config {group}/{name}; those are: {', '.join(list_configs(group))}.")


def places() -> list[Traversable | Path]:
    """Where configs stand: varzoo's, then those that $VARZOO_CONFIGS names, as Hydra finds them (`train.yaml`).

    Raises:
        ValueError: the variable is neither pkg://PACKAGE nor file://FOLDER.
    """
    own, named = resources.files("varzoo.configs"), os.environ.get("VARZOO_CONFIGS")
    if named is None:
        return [own]
    kind, _, where = named.partition("://")
    if kind not in ("pkg", "file"):
        raise ValueError(f"VARZOO_CONFIGS must be pkg://PACKAGE or file://FOLDER, got {named!r}.")
    return [own, resources.files(where) if kind == "pkg" else Path(where)]
