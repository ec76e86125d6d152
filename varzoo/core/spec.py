"""TokenSpec: what tokens look like. A tokenizer and a generator combine if and only if their specs are equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from varzoo.core.errors import unknown

LAYOUTS = {1: "sequence", 2: "grid", 3: "video"}


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """The kind, layout and range of the tokens of one image or clip.

    Args:
        kind: "discrete" (integer ids) or "continuous" (real vectors).
        shape: `(n,)` for a sequence, `(h, w)` for a grid, `(t, h, w)` for a video; flattened in raster order.
        size: codebook size of discrete tokens, channels of continuous ones.
        depth: ids per position: 1, RVQ levels, TokenBridge channels or bit groups.
        prefix_decodes: whether the first k tokens alone decode to an image, for any k >= 1 (D-AR: a group at least).

    Tokens of a batch are `[B, N]` int64 (discrete, depth 1), `[B, N, D]` int64 (discrete, depth D > 1) or
    `[B, N, C]` float (continuous), where N = prod(shape).
    """

    kind: Literal["discrete", "continuous"]
    shape: tuple[int, ...]
    size: int
    depth: int = 1
    prefix_decodes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        if self.kind not in ("discrete", "continuous"):
            raise unknown("token kind", self.kind, ("discrete", "continuous"))
        if len(self.shape) not in LAYOUTS or min(self.shape) < 1:
            raise ValueError(f"token shape must be (n,), (h, w) or (t, h, w) of positive sides, got {self.shape}.")
        if self.size < 1 or self.depth < 1:
            raise ValueError(f"size and depth must be at least 1, got size={self.size}, depth={self.depth}.")

    @property
    def length(self) -> int:
        """Number of positions N."""
        return math.prod(self.shape)

    @property
    def layout(self) -> str:
        return LAYOUTS[len(self.shape)]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of tokens on a grid."""
        if len(self.shape) != 2:
            raise ValueError(f"{self} is no grid (h, w).")
        return self.shape[0], self.shape[1]

    def __str__(self) -> str:
        sides = " x ".join(map(str, self.shape))
        range_ = f"{self.size} codes" if self.kind == "discrete" else f"{self.size} channels"
        depth = f", depth {self.depth}" if self.depth > 1 else ""
        prefix = ", any prefix decodes" if self.prefix_decodes else ""
        return f"{self.kind} {self.layout} {sides} of {range_}{depth}{prefix}"


def require_same_tokens(tokenizer: TokenSpec, generator: TokenSpec) -> None:
    """Raise ValueError naming both specs unless tokenizer and generator speak of the same tokens."""
    if tokenizer != generator:
        raise ValueError(
            f"tokenizer and generator do not fit: the tokenizer makes {tokenizer}; the generator expects {generator}. "
            "Choose a tokenizer with the generator's spec, or change `generator.spec` and train anew; "
            f"varzoo list --tokens '{generator}' names what fits."
        )
