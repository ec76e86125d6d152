"""Initial weights that several networks share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def xavier_linear(modules: Iterable[nn.Module]) -> None:
    """Xavier-uniform weights and zero biases in those of the modules that are linear layers."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normal_weight(module: nn.Module) -> None:
    """N(0, 0.02) in a linear layer's or table's weight, as in LlamaGen and GPT-2; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
