"""Draws: all randomness of varzoo, as a pure function of (seed, sample index, name, keys, position).

A draw is looked up, not consumed: image i is the same image whatever the batch size, the rank or what was drawn before,
two decodings can share noise, and a draw that is skipped shifts nothing. The numbers come from Philox4x32-10 (Salmon et
al., 2011) evaluated in integer tensor arithmetic, so that CPU and accelerator see the same integers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SHARED = (1 << 62) - 1  # the pseudo sample index of draws that a whole batch shares


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32 over int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but their low 64 bits are exact, so both halves of the unsigned product are too.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


@dataclass(frozen=True)
class Draws:
    """Random draws of a batch of samples.

    Args:
        seed: the run's seed, any integer (all its bits count).
        samples: one index per row of the batch: the image's index when sampling, the dataset index when training.
        device: where drawn tensors live.
        keys: keys that every draw of this object carries (see `keyed`).

    Every method takes a stream `name`, a trailing `size` per draw, positions `at` `[B, n]` (one draw per position; the
    result is then `[B, n, *size]`, else `[B, *size]`) and any further integer keys by name, such as the solver step.
    """

    seed: int
    samples: tuple[int, ...]
    device: torch.device | str = "cpu"
    keys: tuple[tuple[str, int], ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(int(index) for index in self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def keyed(self, **keys: int) -> Draws:
        """The same samples with further keys, such as the training iteration, on every draw."""
        return replace(self, keys=self.keys + tuple(sorted(keys.items())))

    def rows(self, rows: Sequence[int]) -> Draws:
        """The draws of some rows of the batch."""
        return replace(self, samples=tuple(self.samples[row] for row in rows))

    @property
    def shared(self) -> Draws:
        """One row of draws that does not depend on the samples: what a whole batch has in common."""
        return replace(self, samples=(_SHARED,))

    def uniform(self, name: str, size: tuple[int, ...] = (), *, at: Tensor | None = None,
                dtype: torch.dtype = torch.float32, **keys: int) -> Tensor:
        """Uniforms in [0, 1); float32 ones have 24 bits, so that none rounds to 1, float64 ones 53."""
        words = self._words(name, size, at, keys, words=2)
        if dtype == torch.float64:
            return ((words[0] >> 5) * 67108864 + (words[1] >> 6)).double() * 2.0**-53
        return ((words[0] >> 8).float() * 2.0**-24).to(dtype)

    def normal(self, name: str, size: tuple[int, ...] = (), *, at: Tensor | None = None,
               dtype: torch.dtype = torch.float32, **keys: int) -> Tensor:
        """Standard normals (Box-Muller in float64, then cast)."""
        words = self._words(name, size, at, keys, words=2)
        radius = torch.sqrt(-2.0 * torch.log((words[0].double() + 0.5) * 2.0**-32))
        return (radius * torch.cos(words[1].double() * (2.0**-32 * 2 * math.pi))).to(dtype)

    def gumbel(self, name: str, size: tuple[int, ...] = (), *, at: Tensor | None = None,
               dtype: torch.dtype = torch.float32, **keys: int) -> Tensor:
        """Standard Gumbels, -log(-log u)."""
        words = self._words(name, size, at, keys, words=1)
        return -torch.log(-torch.log((words[0].double() + 0.5) * 2.0**-32)).to(dtype)

    def integers(self, name: str, high: int, size: tuple[int, ...] = (), *, at: Tensor | None = None,
                 **keys: int) -> Tensor:
        """Integers in [0, high), int64."""
        uniform = self.uniform(name, size, at=at, dtype=torch.float64, **keys)
        return (uniform * high).long().clamp_(max=high - 1)

    def permutation(self, name: str, n: int, **keys: Any) -> Tensor:
        """A permutation of range(n) per sample `[B, n]`: the stable argsort of keyed uniforms."""
        return self.uniform(name, (n,), dtype=torch.float64, **keys).argsort(dim=-1, stable=True)

    def truncated_normal(self, name: str, size: tuple[int, ...] = (), *, mean: float, std: float, low: float,
                         high: float, at: Tensor | None = None, **keys: int) -> Tensor:
        """Normals of the given mean and std, restricted to [low, high], float64 (by the inverse CDF)."""
        normal = torch.distributions.Normal(0.0, 1.0)
        bounds = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64, device=self.device)
        below, above = normal.cdf(bounds)
        uniform = self.uniform(name, size, at=at, dtype=torch.float64, **keys)
        return (mean + std * normal.icdf(below + (above - below) * uniform)).clamp(low, high)

    @cached_property
    def _sample_words(self) -> tuple[Tensor, Tensor]:
        """Both halves of the sample indices `[B]`, moved to the device once: a solver draws in every step."""
        sample = torch.tensor(self.samples, dtype=torch.int64, device=self.device)
        return sample & _MASK, (sample >> 32) & _MASK

    def _words(self, name: str, size: tuple[int, ...], at: Tensor | None, keys: dict[str, int],
               words: int) -> list[Tensor]:
        """The first `words` random 32-bit words of every draw, each `[B, (n,) *size]` int64."""
        label = repr((int(self.seed), name, *self.keys, *sorted(keys.items())))
        digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        low, high = self._sample_words
        position = torch.zeros(len(self), 1, dtype=torch.int64, device=self.device) if at is None else at
        position = position.to(self.device) + (0 if at is None else 1)  # 0 is kept for draws without a position
        if position.shape[0] != len(self):
            raise ValueError(f"positions {tuple(position.shape)} do not fit draws of {len(self)} samples.")
        count = math.prod(size)
        element = torch.arange(count, dtype=torch.int64, device=self.device)
        counter = torch.broadcast_tensors(
            element, position[..., None], low[:, None, None], high[:, None, None])
        shape = (len(self), *size) if at is None else (len(self), at.shape[1], *size)
        return [word.reshape(shape) for word in _philox(list(counter), key)[:words]]


@dataclass(frozen=True)
class Recorded:
    """An array of given draws and what its axes mean.

    `axes` names the leading axes, separated by spaces: "batch", "pos", or a key such as "k"; axes left over are the
    draw's own size. "k batch pos" for `[K, B, N, C]` answers `normal(name, (C,), at=positions, k=3)`.
    """

    array: Tensor
    axes: str


@dataclass(frozen=True)
class RecordedDraws:
    """Draws that replay given arrays: how golden cases feed noise, orders, masks, timesteps and uniforms.

    `arrays` maps a stream name to what is to be returned for it, whatever kind of draw is asked. A boolean array
    answers a uniform with 0 where it is True and 1 where it is False, so that `uniform < rate` becomes the array.
    """

    arrays: dict[str, Recorded]
    samples: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.samples)

    def keyed(self, **keys: int) -> RecordedDraws:
        return self

    def rows(self, rows: Sequence[int]) -> RecordedDraws:
        return replace(self, samples=tuple(self.samples[row] for row in rows))

    @property
    def shared(self) -> RecordedDraws:
        return replace(self, samples=(0,))

    def uniform(self, name: str, size: tuple[int, ...] = (), *, at: Tensor | None = None,
                dtype: torch.dtype = torch.float32, **keys: int) -> Tensor:
        value = self._replay(name, size, at, keys)
        return ((~value).to(dtype) if value.dtype == torch.bool else value.to(dtype))

    def normal(self, name: str, size: tuple[int, ...] = (), *, at: Tensor | None = None,
               dtype: torch.dtype = torch.float32, **keys: int) -> Tensor:
        return self._replay(name, size, at, keys).to(dtype)

    gumbel = normal

    def integers(self, name: str, high: int, size: tuple[int, ...] = (), *, at: Tensor | None = None,
                 **keys: int) -> Tensor:
        return self._replay(name, size, at, keys).long()

    def permutation(self, name: str, n: int, **keys: int) -> Tensor:
        return self._replay(name, (n,), None, keys).long()

    def truncated_normal(self, name: str, size: tuple[int, ...] = (), *, mean: float, std: float, low: float,
                         high: float, at: Tensor | None = None, **keys: int) -> Tensor:
        return self._replay(name, size, at, keys).double()

    def _replay(self, name: str, size: tuple[int, ...], at: Tensor | None, keys: dict[str, Any]) -> Tensor:
        if name not in self.arrays:
            raise ValueError(f"no draws were recorded for stream {name!r}; recorded: {sorted(self.arrays)}.")
        recorded = self.arrays[name]
        index: list[Any] = []
        batch = torch.tensor(self.samples)
        for axis in recorded.axes.split():
            if axis == "batch":
                index.append(batch[:, None] if at is not None else batch)
            elif axis == "pos":
                if at is None:
                    raise ValueError(f"stream {name!r} was recorded by position, but drawn without positions.")
                index.append(at.cpu())
            else:
                index.append(keys[axis])
        value = recorded.array[tuple(index)] if index else recorded.array
        shape = (len(self), *size) if at is None else (*at.shape, *size)
        return value.broadcast_to(shape).to(self.device) if value.shape != shape else value.to(self.device)


AnyDraws = Draws | RecordedDraws


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Ids `[...]` that uniforms `[...]` in [0, 1) pick from (unnormalised) probabilities `[..., V]`.

    The sum runs in float64; an id of probability 0 is never picked, even where rounding makes a uniform reach 1.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[..., -1:].contiguous()
    ids = torch.searchsorted(cumulative, uniforms.double()[..., None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last id that adds anything
    return torch.minimum(ids, last)[..., 0]
