"""Features of prompts made by an encoder: kept on disk, and not made twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from varzoo.text.encoder import TextEncoder
from varzoo.text.features import TextFeatures, load_features, origin_of, save_features
from varzoo.text.prompts import class_prompts


def cached_features(path: str | Path, prompts: Sequence[str], encoder: TextEncoder) -> TextFeatures:
    """The features of prompts: from the cache at `path` if there is one, else encoded and kept there.

    Raises:
        ValueError: the cache is another encoder's, or of other prompts; it is left as it is.
    """
    if not Path(path).exists():
        features = encoder.encode(prompts)
        save_features(path, features, encoder.identity())
        return features
    features, made_by, asked = load_features(path), origin_of(path).get("encoder"), encoder.identity()
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
