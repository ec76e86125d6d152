"""Conditions as prefix tokens of a causal generator: one class token, or projected text features."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from varzoo.core.errors import unknown
from varzoo.generators.base import Condition

PADDING = ("itself", "crossed")


class Conditioner(nn.Module, ABC):
    """Condition -> prefix tokens.

    Attributes:
        length: number of prefix tokens T.
        num_classes: class labels it knows, None for text.
        drop: probability with which training replaces the condition by the null condition.
        padding_sees: what a padded token of a caption attends to. "itself" (LlamaGen); "crossed" (LANTERN's target,
            whose two additive masks overflow where both apply): what exactly one of causality and padding hides.
    """

    padding_sees: str = "itself"

    length: int
    num_classes: int | None
    drop: float

    @abstractmethod
    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Prefix tokens `[B, T, width]`; samples where `dropped` `[B]` is True get the null condition."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The null condition to guide away from, of the same size (and mask)."""

    @abstractmethod
    def check(self, condition: Condition) -> None:
        """Raise ValueError if the condition is of another kind or shape."""


class ClassPrefix(Conditioner):
    """A single token per class; label `num_classes` is the null class.

    Args:
        num_classes: classes.
        width: of the token.
        drop: probability of the null class in training; without it (0) there is no null class, so no guidance.
    """

    length = 1

    num_classes: int

    def __init__(self, *, num_classes: int, width: int, drop: float) -> None:
        super().__init__()
        self.num_classes, self.drop = num_classes, drop
        self.table = nn.Embedding(num_classes + (drop > 0), width)

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        labels = self.null_labels(condition) if condition.labels is None else condition.labels
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.num_classes)
        return self.table(labels)[:, None]

    def null(self, condition: Condition) -> Condition:
        return Condition.classes(self.null_labels(condition))

    def null_labels(self, condition: Condition) -> Tensor:
        """The null class `[B]`."""
        if self.drop == 0:
            raise ValueError(
                "this model was trained without dropping its class (drop=0), so it has no null class: sample with "
                "labels and without guidance."
            )
        return torch.full((condition.size,), self.num_classes, device=self.table.weight.device)

    def check(self, condition: Condition) -> None:
        if condition.features is not None:
            raise ValueError("this model is class-conditional, but text features were given.")


class TextPrefix(Conditioner):
    """Text features, padded to a fixed length, through a two-layer MLP; a fixed random caption is the null one.

    Args:
        length: number of prefix tokens; features of shorter captions are padded on the left with zeros.
        channels: of the text features (2048 for FLAN-T5 XL).
        width: of the tokens.
        drop: probability of the null caption in training; its mask stays that of the caption, as officially.
        padding_sees: see `Conditioner`.
    """

    null_features: Tensor
    num_classes = None

    def __init__(self, *, length: int, channels: int, width: int, drop: float, padding_sees: str = "itself") -> None:
        super().__init__()
        if padding_sees not in PADDING:
            raise unknown("what padding sees", padding_sees, PADDING)
        self.length, self.drop, self.padding_sees = length, drop, padding_sees
        self.projection = nn.Sequential(nn.Linear(channels, width, bias=False), nn.GELU(approximate="tanh"),
                                        nn.Linear(width, width, bias=False))
        self.register_buffer("null_features", torch.randn(length, channels) / channels**0.5)

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        self.check(condition)
        null = self.null_features.expand(condition.size, -1, -1)
        features = null if condition.features is None else condition.features
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.null_features, features)
        return self.projection(features.to(next(self.projection.parameters()).dtype))

    def null(self, condition: Condition) -> Condition:
        features = self.null_features.expand(condition.size, -1, -1)
        mask = condition.mask
        if mask is None:
            mask = torch.ones(condition.size, self.length, dtype=torch.bool, device=features.device)
        return Condition.text(features, mask)

    def check(self, condition: Condition) -> None:
        features = condition.features
        if condition.ids is not None:
            raise ValueError("this model is conditioned on text features, but token ids were given: choose the text "
                             "encoder that it was trained with.")
        if features is not None and features.shape[1:] != self.null_features.shape:
            raise ValueError(f"text features must be [B, {', '.join(map(str, self.null_features.shape))}], padded on "
                             f"the left, got {list(features.shape)}.")


class CaptionPrefix(Conditioner):
    """Text token ids, through a table of the generator's own; there is no null caption, so no guidance.

    Args:
        length: number of prefix tokens; the caller pads or cuts captions to it.
        vocabulary: number of text tokens.
        width: of the tokens.
    """

    num_classes = None
    drop = 0.0

    def __init__(self, *, length: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        return self.table(condition.ids)

    def null(self, condition: Condition) -> Condition:
        raise ValueError("this model knows no null caption: sample without guidance.")

    def check(self, condition: Condition) -> None:
        ids, size = condition.ids, self.table.num_embeddings
        if ids is None:
            raise ValueError("this model is conditioned on text token ids: give Condition.captions(ids), or prompts "
                             "and the text tokenizer that it was trained with.")
        if ids.ndim != 2 or ids.shape[1] != self.length or ids.min() < 0 or ids.max() >= size:
            raise ValueError(f"captions must be ids [B, {self.length}] in 0 to {size - 1}, got {list(ids.shape)} with "
                             f"ids {int(ids.min())} to {int(ids.max())}.")
