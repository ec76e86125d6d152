"""Codes and how well they are used: distances to a codebook, its entropy and its perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

ENTROPY_TEMPERATURE = 0.01


def squared_distances(latents: Tensor, codes: Tensor) -> Tensor:
    """From latents `[..., D]` to all codes `[K, D]`: `[..., K]`. Expanded: differences would take D times as much."""
    return latents.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * latents @ codes.T


def entropy_loss(affinities: Tensor) -> Tensor:
    """Mean entropy of the tokens' code distributions minus entropy of their mean (as in MAGVIT-v2, arXiv 2310.05737).

    Args:
        affinities: `[B, N, K]`, larger for nearer codes; softmax at the official temperature of 0.01.
    """
    affinities = affinities / ENTROPY_TEMPERATURE
    probabilities = affinities.softmax(dim=-1)
    per_token = -(probabilities * affinities.log_softmax(dim=-1)).sum(dim=-1).mean()
    mean = probabilities.mean(dim=(0, 1))
    return per_token + (mean * (mean + 1e-5).log()).sum()


def perplexity(ids: Tensor, size: int) -> Tensor:
    """exp of the entropy of the ids' histogram over `size` codes: 1 if all are the same, `size` if evenly used."""
    shares = ids.flatten().bincount(minlength=size) / ids.numel()
    return torch.special.entr(shares).sum().exp()
