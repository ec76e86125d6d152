"""Weights on disk: safetensors with their config in the header; other people's files read safely, or refused.

A file is written under a temporary name and renamed, so that a killed run leaves either the old file or the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_KEY = "varzoo"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors, with `config` (JSON-serialisable) in the header."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={CONFIG_KEY: json.dumps(config)})


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The config in the header of a safetensors file, None if the file is of another origin or format."""
    path = existing(path)
    if path.suffix != ".safetensors":
        return None
    with _safe_open(path) as file:
        text = (file.metadata() or {}).get(CONFIG_KEY)
    return json.loads(text) if text else None


def read_weights(path: str | Path, entries: Sequence[str] = ("model_ema", "ema", "state_dict_ema", "model", "module",
                                                              "state_dict")) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors or a PyTorch file, without ever running code from it.

    Args:
        path: the file.
        entries: where a PyTorch file's dict may keep the weights, the preferred first; without any, the file's dict
            itself is the state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not a checkpoint, or needs code to be unpickled.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        with _safe_open(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    content = _read_pickle(path)
    for entry in entries:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
    state = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors under any of {', '.join(entries)}; its keys: {list(content)[:8]}.")
    return state


def read_entry(path: str | Path, name: str) -> Any:
    """One entry of a PyTorch file's dict, such as the configuration beside the weights; None if there is none.

    Objects of the known configuration classes become plain dicts. Raises like `read_weights`.
    """
    path = existing(path)
    content = {} if path.suffix == ".safetensors" else _read_pickle(path)
    return _plain(content.get(name)) if isinstance(content, dict) else None


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict, every name and shape of which must fit. Raises ValueError naming what does not."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    reshaped = [f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                for name in own if name in state and state[name].shape != own[name].shape]
    kinds = {"missing": missing, "unexpected": extra, "of another shape": reshaped}
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{source} is not a checkpoint of this {type(model).__name__}: {'; '.join(problems)}. "
            "Choose the config that it was trained with."
        )
    model.load_state_dict(dict(state))


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes, dtypes and values: the identity of a tokenizer in cache manifests."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def existing(path: str | Path) -> Path:
    """The path if there is a file; else FileNotFoundError that names what lies beside it."""
    path = Path(path)
    if path.is_file():
        return path
    files = sorted(file.name for file in path.parent.glob("*") if file.is_file()) if path.parent.is_dir() else []
    beside = f"; in {path.parent}: {', '.join(files[:8]) or 'nothing'}" if path.parent.is_dir() else ""
    raise FileNotFoundError(
        f"no checkpoint at {path}{beside}. A missing checkpoint is never replaced by random weights."
    )


@contextlib.contextmanager
def _safe_open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); fetch or write it again."
        ) from error


class _StandIn:
    """What takes the place of a configuration class in a pickle: it becomes a dict, and runs nothing of the file's."""

    def __new__(cls, *arguments: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]  # it stands in for another
        return OrderedDict(*(argument for argument in arguments if isinstance(argument, Mapping)))


# Classes of official files' configurations: MAR's arguments as they are, D-AR's config as a stand-in.
_HARMLESS: list[Any] = [argparse.Namespace, (_StandIn, "config_util.Config")]


def _plain(value: Any) -> Any:
    """Dicts and lists all the way down; what an object kept as attributes is an entry too."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in {**getattr(value, "__dict__", {}), **value}.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = []
        with contextlib.suppress(Exception):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        needs = f" It asks for: {', '.join(names)}." if names else ""
        raise ValueError(
            f"{path} is refused: unpickling it would run code, or it is damaged.{needs} If you trust its origin, load "
            "it where it was made, save only its state dict (torch.save(state_dict, ...)) and use that file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint ({error}); fetch it again.") from error
