"""What a training step returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise and its named parts (detached scalars, for the logs)."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
