"""Hydra configs: the registry of varzoo, and the names in it."""

from __future__ import annotations

import fnmatch
from importlib import resources


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models (tokenizer, generator and sampler settings together) that `varzoo.load` takes."""
    return list_configs("model", pattern)


def list_configs(group: str, pattern: str = "*") -> list[str]:
    """Names of the configs of a group that a shell pattern matches; those that others are made of are left out."""
    folder = resources.files("varzoo.configs") / group
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return [name for name in names if fnmatch.fnmatch(name, pattern) and not name.startswith("_")]
