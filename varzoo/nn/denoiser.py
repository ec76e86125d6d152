"""What networks of a conditional denoising have in common: adaLN modulation by time plus a condition per token.

The modulation depends on condition and time alone. A sampler knows its times in advance, so `Denoiser.at` computes what
the times and the conditions need once, and the modulation of many solver steps in one product where memory allows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from varzoo.nn.initial import xavier_linear

FREQUENCIES = 256
MODULATION_NUMBERS = 2**24  # kept at a time while sampling: 64 MiB in float32


def time_frequencies(times: Tensor) -> Tensor:
    """Cosines, then sines, of times `[R]` (on the scale of training timesteps) at 128 frequencies each, `[R, 256]`."""
    return get_timestep_embedding(times, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)


class FinalLayer(nn.Module):
    """linear(norm(h) * (1 + scale) + shift)."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm(hidden) * (1 + scale) + shift)


class Denoiser(nn.Module, ABC):
    """Network of a denoising: noised tokens, times and conditions -> what the training objective asks for.

    Args:
        channels: C of a token.
        out_channels: C for epsilon, 2C for epsilon and a learned variance.
        condition_width: width of the condition vectors.
        width: hidden width W.
        blocks: with a linear layer `modulation` each, which are called with hidden states and its output.
    """

    def __init__(self, *, channels: int, out_channels: int, condition_width: int, width: int,
                 blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = TimestepEmbedding(FREQUENCIES, width)
        self.condition_embed = nn.Linear(condition_width, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(blocks)
        self.final = FinalLayer(width, out_channels)
        self._initialise()

    def _initialise(self) -> None:
        xavier_linear(self.modules())
        layer: Any
        for layer in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)  # the head starts as the zero function, whatever its condition

    def forward(self, noised: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """noised `[..., C]`, times `[...]` (an axis may be 1), condition `[..., D]` -> `[..., out_channels]`."""
        embedded = self.time_embed(time_frequencies(times.flatten())).unflatten(0, times.shape)
        return self.modulated(noised, self.modulation(embedded + self.condition_embed(condition)))

    def modulation(self, embedded: Tensor) -> Iterator[Tensor]:
        """Time plus condition `[..., W]` -> the modulation of every block, then of the last layer, one at a time."""
        activated = F.silu(embedded)
        return (layer.modulation(activated) for layer in (*self.blocks, self.final))

    @abstractmethod
    def modulated(self, noised: Tensor, modulation: Iterable[Tensor]) -> Tensor:
        """The network for a given modulation; `noised` may lack leading axes that the modulation has."""

    def at(self, times: Tensor, condition: Tensor) -> ConditionedDenoiser:
        """This network at times `[K]` known in advance and condition rows `[..., D]`, as (noised, k) -> output."""
        return ConditionedDenoiser(self, times, condition)


class ConditionedDenoiser:
    """A `Denoiser` at fixed times and conditions; equals its forward, computed in another order.

    Modulations are made for as many steps at once as `MODULATION_NUMBERS` allows, so memory stays bounded however many
    rows and steps there are; where not even those of one step fit, each layer's is made when it is needed.
    """

    def __init__(self, network: Denoiser, times: Tensor, condition: Tensor) -> None:
        self.network = network
        self.condition = network.condition_embed(condition)
        self.times = network.time_embed(time_frequencies(times).to(self.condition.dtype))
        layers = (*network.blocks, network.final)
        rows = self.condition.numel() // self.condition.shape[-1]
        per_step = rows * sum(layer.modulation.out_features for layer in layers)
        self.chunk = MODULATION_NUMBERS // max(1, per_step)
        self._first = -1
        self._modulation: list[Tensor] = []

    def __call__(self, noised: Tensor, k: int) -> Tensor:
        """noised `[..., C]`, whose leading axes may be fewer than the condition's; k counts the times."""
        noised = noised.to(self.condition.dtype)  # the solver's state stays float32, the network has its own precision
        if self.chunk < 1:
            return self.network.modulated(noised, self.network.modulation(self.times[k] + self.condition))
        first = k - k % self.chunk
        if first != self._first:
            self._modulation = []  # freed before the next ones are made
            times = self.times[first:first + self.chunk]
            times = times.view(len(times), *[1] * (self.condition.ndim - 1), -1)
            self._first, self._modulation = first, list(self.network.modulation(times + self.condition))
        return self.network.modulated(noised, [modulation[k - first] for modulation in self._modulation])
