"""A short training of a generator on one batch."""

from __future__ import annotations

import torch

from varzoo.core.draws import Draws
from varzoo.generators.base import Batch, Generator


def losses_while_learning(model: Generator, batch: Batch, *, steps: int, lr: float = 3e-3) -> list[float]:
    """The loss of every step of AdamW on what requires a gradient."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    losses = []
    for iteration in range(steps):
        loss = model.loss(batch, Draws(0, range(len(batch.tokens))).keyed(iteration=iteration), 0.0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
