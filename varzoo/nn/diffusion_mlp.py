"""The diffusion head of MAR (arXiv 2406.11838, 3.2-3.3): a small residual MLP that denoises one token at a time.

Everything adaLN needs depends on condition and time alone, and is more than half of an evaluation's cost. A sampler
knows its times in advance, so `DiffusionMLP.at` computes the modulation of many solver steps in one product; the
`benchmarks/diffusion_head.py` ratio is what that saves.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from varzoo.core.keymap import Rename, Rule

FREQUENCIES = 256
MODULATION_NUMBERS = 2**24  # kept at a time while sampling: 64 MiB in float32


def time_frequencies(times: Tensor) -> Tensor:
    """Cosines, then sines, of times `[R]` (on the scale of training timesteps) at 128 frequencies each, `[R, 256]`."""
    return get_timestep_embedding(times, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)


class ResidualBlock(nn.Module):
    """h + gate * mlp(norm(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)


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


class DiffusionMLP(nn.Module):
    """Network of a token's denoising: noised token, time and condition -> what the training objective asks for.

    Args:
        channels: C of a token.
        out_channels: 2C for epsilon and a learned variance.
        condition_width: width of the condition vectors.
        width: hidden width.
        depth: number of residual blocks.
    """

    def __init__(self, *, channels: int, out_channels: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.width, self.depth = channels, out_channels, width, depth
        self.time_embed = TimestepEmbedding(FREQUENCIES, width)
        self.condition_embed = nn.Linear(condition_width, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final = FinalLayer(width, out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)  # the head starts as the zero function, whatever its condition

    def forward(self, noised: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """noised `[..., C]`, times `[...]`, condition `[..., D]` -> `[..., out_channels]`."""
        embedded = self.time_embed(time_frequencies(times.flatten())).unflatten(0, times.shape)
        return self.modulated(noised, self.modulation(embedded + self.condition_embed(condition)))

    def modulation(self, embedded: Tensor) -> list[Tensor]:
        """Time plus condition `[..., W]` -> the modulation of every block `[..., 3W]` and of the last layer."""
        activated = F.silu(embedded)
        return [layer.modulation(activated) for layer in (*self.blocks, self.final)]

    def modulated(self, noised: Tensor, modulation: list[Tensor]) -> Tensor:
        """The network for a given modulation; `noised` may lack leading axes that the modulation has."""
        hidden = self.input(noised)
        for block, block_modulation in zip(self.blocks, modulation):
            hidden = block(hidden, block_modulation)
        return self.final(hidden, modulation[-1])

    def at(self, times: Tensor, condition: Tensor) -> ConditionedMLP:
        """This network at times `[K]` known in advance and condition rows `[..., D]`, as (noised, k) -> output."""
        return ConditionedMLP(self, times, condition)


class ConditionedMLP:
    """A `DiffusionMLP` at fixed times and conditions; equals its forward, computed in another order.

    Modulations are made for as many steps at once as `MODULATION_NUMBERS` allows, so memory stays bounded however many
    rows and steps there are.
    """

    def __init__(self, network: DiffusionMLP, times: Tensor, condition: Tensor) -> None:
        self.network = network
        self.condition = network.condition_embed(condition)
        self.times = network.time_embed(time_frequencies(times).to(self.condition.dtype))
        per_step = (3 * network.depth + 2) * self.condition.numel()
        self.chunk = max(1, MODULATION_NUMBERS // max(1, per_step))
        self._first, self._modulation = -1, []

    def __call__(self, noised: Tensor, k: int) -> Tensor:
        """noised `[..., C]`, whose leading axes may be fewer than the condition's; k counts the times."""
        first = k - k % self.chunk
        if first != self._first:
            self._modulation = []  # freed before the next ones are made
            times = self.times[first:first + self.chunk]
            times = times.view(len(times), *[1] * (self.condition.ndim - 1), -1)
            self._first, self._modulation = first, self.network.modulation(times + self.condition)
        noised = noised.to(self.condition.dtype)  # the solver's state stays float32, the network has its own precision
        return self.network.modulated(noised, [modulation[k - first] for modulation in self._modulation])


def diffusion_mlp_rules(official: str, ours: str) -> list[Rule]:
    """Key map rules of the head as MAR, Hi-MAR and CSpD name it, below the two prefixes."""
    names = {
        "time_embed.mlp.0.{p}": "time_embed.linear_1.{p}",
        "time_embed.mlp.2.{p}": "time_embed.linear_2.{p}",
        "cond_embed.{p}": "condition_embed.{p}",
        "input_proj.{p}": "input.{p}",
        "res_blocks.{i}.in_ln.{p}": "blocks.{i}.norm.{p}",
        "res_blocks.{i}.mlp.{j}.{p}": "blocks.{i}.mlp.{j}.{p}",
        "res_blocks.{i}.adaLN_modulation.1.{p}": "blocks.{i}.modulation.{p}",
        "final_layer.linear.{p}": "final.linear.{p}",
        "final_layer.adaLN_modulation.1.{p}": "final.modulation.{p}",
    }
    return [Rename(official + theirs, ours + name) for theirs, name in names.items()]
