"""Features of prompts, and their cache on disk.

A cache is one safetensors file: `features` `[B, T, C]`, `mask` `[B, T]` (True where valid) and, in the header, what
made them: the encoder (name, hash, dtype, length, channels, padding side, cleaning) and the prompts. A file of other
origin with those two tensors and no such header can be loaded too, but never passes for features of given prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varzoo.core.checkpoint import read_config, read_weights, save_weights
from varzoo.generators.base import Condition
from varzoo.text.prompts import class_prompts

if TYPE_CHECKING:
    from varzoo.text.encoder import TextEncoder

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


def save_features(path: str | Path, features: TextFeatures, encoder: TextEncoder) -> None:
    """Write a cache of what `encoder` made, at once or not at all."""
    manifest = {"encoder": encoder.identity(), "prompts": list(features.prompts)}
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
                            prompts=tuple(_manifest(path).get("prompts", ())))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cached_features(path: str | Path, prompts: Sequence[str], encoder: TextEncoder) -> TextFeatures:
    """The features of prompts: from the cache at `path` if there is one, else encoded and kept there.

    Raises:
        ValueError: the cache is another encoder's, or of other prompts; it is left as it is.
    """
    if not Path(path).exists():
        features = encoder.encode(prompts)
        save_features(path, features, encoder)
        return features
    features, made_by, asked = load_features(path), _manifest(Path(path)).get("encoder"), encoder.identity()
    remedy = "Choose another file, or delete it."
    if made_by is None:
        raise ValueError(f"{path} does not say which encoder and prompts it is of. {remedy}")
    differing = [f"{name} {made_by.get(name)} instead of {asked[name]}" for name in asked
                 if name != "name" and made_by.get(name) != asked[name]]  # the same weights may lie elsewhere
    if differing:
        raise ValueError(f"{path} holds features of text encoder {made_by.get('name')}, not of {asked['name']}: "
                         f"{', '.join(differing)}. {remedy}")
    if features.prompts != tuple(prompts):
        raise ValueError(f"{path} holds features of other prompts ({len(features)}, beginning with "
                         f"{features.prompts[0]!r}; asked for {len(prompts)}, beginning with {prompts[0]!r}). {remedy}")
    return features


def class_features(encoder: TextEncoder, class_names: Sequence[str], template: str) -> TextFeatures:
    """A row of features per class, to train a text-conditional generator on a class-labelled data set.

        table = class_features(encoder, ["zero", "one", ...], "a handwritten digit {}")    # features [10, T, C]
        batch = Batch(tokens=tokens, condition=table.condition(labels))
    """
    return encoder.encode(class_prompts(class_names, template))


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"text features are kept as .safetensors, got {path}.")
    return path


def _manifest(path: Path) -> dict[str, Any]:
    return (read_config(path) or {}).get(HEADER, {})
