"""The diffusion head of MAR (arXiv 2406.11838, 3.2-3.3): a small residual MLP that denoises one token at a time.

More than half of an evaluation's cost is adaLN, which `Denoiser.at` computes for many solver steps in one product; the
`benchmarks/diffusion_head.py` ratio is what that saves.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from varzoo.core.keymap import Rename, Rule
from varzoo.nn.denoiser import Denoiser
from varzoo.nn.few_rows import FewRowsLinear


class ResidualBlock(nn.Module):
    """h + gate * mlp(norm(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(FewRowsLinear(width, width), nn.SiLU(), FewRowsLinear(width, width))
        self.modulation = FewRowsLinear(width, 3 * width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)


class DiffusionMLP(Denoiser):
    """A denoiser of single tokens.

    Args:
        channels, out_channels, condition_width, width: see `Denoiser`.
        depth: number of residual blocks.
    """

    def __init__(self, *, channels: int, out_channels: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__(channels=channels, out_channels=out_channels, condition_width=condition_width, width=width,
                         blocks=(ResidualBlock(width) for _ in range(depth)))

    def modulated(self, noised: Tensor, modulation: Iterable[Tensor]) -> Tensor:
        hidden, layers = self.input(noised), iter(modulation)
        for block in self.blocks:
            hidden = block(hidden, next(layers))
        return self.final(hidden, next(layers))


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
