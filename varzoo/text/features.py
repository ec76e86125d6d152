"""Features of prompts, and their cache on disk.

A cache is one safetensors file: `features` `[B, T, C]`, `mask` `[B, T]` (True where valid) and, in the header, what
made them: the encoder (name, hash, dtype, length, channels, padding side, cleaning) and the prompts. A file of other
origin with those two tensors and no such header can be loaded too, but never passes for features of given prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from varzoo.core.checkpoint import read_config, read_weights, save_weights
from varzoo.generators.base import Condition

HEADER = "text_features"


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """Features of B prompts.

    Args:
        features: `[B, T, C]`, zero at padding.
        mask: `[B, T]` bool, True where valid.
        prompts: the B prompts, or nothing where they are not known.
    """

    features: Tensor
    mask: Tensor
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        features, mask = self.features, self.mask
        if features.ndim != 3 or not features.is_floating_point() or mask.shape != features.shape[:2]:
            raise ValueError(f"text features must be floats [B, T, C] with a mask [B, T], got {features.dtype} "
                             f"{list(features.shape)} with {list(mask.shape)}.")
        if self.prompts and len(self.prompts) != len(features):
            raise ValueError(f"{len(features)} features cannot belong to {len(self.prompts)} prompts.")

    def __len__(self) -> int:
        return len(self.features)

    def condition(self, rows: Tensor) -> Condition:
        """The condition of some rows `[b]`, any number of times each: labels of a batch, for a table of classes."""
        rows = rows.to(self.features.device)
        return Condition.text(self.features[rows], self.mask[rows])


def save_features(path: str | Path, features: TextFeatures, encoder: Mapping[str, Any]) -> None:
    """Write a cache of what an encoder (its `identity()`) made, at once or not at all."""
    manifest = {"encoder": encoder, "prompts": list(features.prompts)}
    save_weights(_checked(path), {"features": features.features, "mask": features.mask}, {HEADER: manifest})


def load_features(path: str | Path) -> TextFeatures:
    """Features from a file, whoever made it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or does not hold features and their mask.
    """
    path = _checked(path)
    if not path.is_file():
        raise FileNotFoundError(f"no text features at {path}; `prompts=FILE features={path}` makes them.")
    tensors = read_weights(path)
    if set(tensors) != {"features", "mask"}:
        raise ValueError(f"{path} must hold features [B, T, C] and mask [B, T], got {sorted(tensors)}.")
    try:
        return TextFeatures(features=tensors["features"], mask=tensors["mask"].bool(),
                            prompts=tuple(origin_of(path).get("prompts", ())))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def origin_of(path: str | Path) -> dict[str, Any]:
    """What a cache says made it, `encoder` and `prompts`; nothing where it is a file of other origin."""
    return (read_config(path) or {}).get(HEADER, {})


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"text features are kept as .safetensors, got {path}.")
    return path
