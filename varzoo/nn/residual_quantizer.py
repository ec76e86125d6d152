"""Residual vector quantisation with codebooks learned by moving averages (RQ-VAE, arXiv 2203.01941, section 3.1).

A vector becomes D codes: the nearest code, the one nearest to what is left of the vector, and so on; it is decoded as
the sum of their vectors. The codebooks have no gradients: each code follows a moving average of the vectors it was
chosen for, and a code that is hardly ever chosen is restarted at one of the vectors of the batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.nn.codebook import squared_distances
from varzoo.nn.processes import rows_of_processes, sum_over_processes

EPSILON = 1e-5  # added to every code's count before vectors are divided by it
TILE_NOISE = 0.01  # of repeated restart candidates, over the root of the dimension


class Quantised(NamedTuple):
    """Ids `[..., D]` and the sums of the first 1 .. D code vectors, `[D, ..., C]`."""

    ids: Tensor
    partial_sums: Tensor


class Codebook(nn.Module):
    """K code vectors, the moving averages of how often each is chosen, and of the sums of what it is chosen for."""

    vectors: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        vectors = torch.empty(size, channels).uniform_(-1 / size, 1 / size)
        self.register_buffer("vectors", vectors)
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", vectors.clone())

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances `[..., K]` of vectors `[..., C]`."""
        return squared_distances(x, self.vectors)

    @torch.no_grad()
    def follow(self, x: Tensor, ids: Tensor, decay: float, restarts: AnyDraws | None, level: int) -> None:
        """Move towards the vectors `[n, C]` for which `ids` `[n]` were chosen; restart dead codes if draws are given.

        With several processes, all see the sums over all and restart from the same vectors.
        """
        chosen = F.one_hot(ids, len(self.vectors)).to(x.dtype)
        self.counts.lerp_(sum_over_processes(chosen.sum(0)), 1 - decay)
        self.sums.lerp_(sum_over_processes(chosen.T @ x), 1 - decay)
        dead = self.counts < 1
        if restarts is not None and dead.any():
            candidates = restart_candidates(rows_of_processes(x), len(self.vectors), restarts, level)
            self.sums[dead], self.counts[dead] = candidates[dead], 1.0
        total = self.counts.sum()
        smoothed = total * (self.counts + EPSILON) / (total + len(self.counts) * EPSILON)
        self.vectors.copy_(self.sums / smoothed[:, None])


def restart_candidates(x: Tensor, count: int, draws: AnyDraws, level: int) -> Tensor:
    """`count` of the vectors `[n, C]` in random order; where they are too few, repeated and a little perturbed."""
    if len(x) < count:
        x = x.repeat(math.ceil(count / len(x)), 1)
        noise = draws.shared.uniform("restart_noise", tuple(x.shape), level=level)[0].to(x.device)
        x = x + noise * (TILE_NOISE / x.shape[1] ** 0.5)
    return x[draws.shared.permutation("restart_order", len(x), level=level)[0, :count].to(x.device)]


class ResidualQuantizer(nn.Module):
    """D levels of quantisation, each of what the levels before left.

    Args:
        size: codes K of a codebook.
        channels: dimension C of a code vector.
        depth: levels D.
        shared: one codebook for all levels, or one for each.
        decay: of the moving averages.
        restart: whether codes with an average count below 1 per step are restarted.
    """

    def __init__(self, *, size: int, channels: int, depth: int, shared: bool, decay: float, restart: bool) -> None:
        super().__init__()
        if size < 1 or channels < 1 or depth < 1 or not 0 <= decay < 1:
            raise ValueError(f"need size, channels, depth >= 1 and 0 <= decay < 1, got {size}, {channels}, {depth} and "
                             f"{decay}.")
        self.size, self.depth, self.decay, self.restart = size, depth, decay, restart
        self.codebooks = nn.ModuleList(Codebook(size, channels) for _ in range(1 if shared else depth))

    def codebook(self, level: int) -> Codebook:
        """The codebook of a level, the first being 0."""
        book = self.codebooks[level if len(self.codebooks) > 1 else 0]
        assert isinstance(book, Codebook)
        return book

    def vectors(self) -> Tensor:
        """All code vectors: `[K, C]` where the levels share them, else `[D, K, C]`."""
        stacked = torch.stack([self.codebook(level).vectors for level in range(len(self.codebooks))])
        return stacked[0] if len(stacked) == 1 else stacked

    @torch.no_grad()
    def forward(self, x: Tensor, learn: AnyDraws | None = None) -> Quantised:
        """Quantise vectors `[..., C]`.

        With draws (of the whole batch's restarts) the codebooks learn from them. A level's vectors are read before its
        codebook moves; as officially, a shared codebook moves after every level, so the next level sees the moved one.
        """
        residual, total = x, torch.zeros_like(x)
        ids, sums = [], []
        for level in range(self.depth):
            book = self.codebook(level)
            nearest = book.distances(residual).argmin(dim=-1)
            chosen = F.embedding(nearest, book.vectors)
            if learn is not None:
                book.follow(residual.reshape(-1, x.shape[-1]), nearest.flatten(), self.decay,
                            learn if self.restart else None, level)
            residual, total = residual - chosen, total + chosen
            ids.append(nearest)
            sums.append(total)
        return Quantised(torch.stack(ids, dim=-1), torch.stack(sums))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids `[..., d]` of the first d <= D levels -> their code vectors `[..., d, C]`, not summed."""
        levels = range(ids.shape[-1])
        return torch.stack([F.embedding(ids[..., level], self.codebook(level).vectors) for level in levels], dim=-2)

    def soft(self, x: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Distributions `[..., D, K]` over the codes of every level: softmax(-distance^2 / temperature).

        Args:
            x: vectors `[..., C]`.
            ids: `[..., D]` the codes that the residuals follow.
        """
        before = self.embed(ids).cumsum(dim=-2).roll(1, dims=-2)
        before[..., 0, :] = 0
        residuals = (x[..., None, :] - before).unbind(dim=-2)
        return torch.stack([(-self.codebook(level).distances(residual) / temperature).softmax(dim=-1)
                            for level, residual in enumerate(residuals)], dim=-2)

    def draw(self, x: Tensor, temperature: float, draws: AnyDraws) -> Tensor:
        """Ids `[B, n, D]` of vectors `[B, n, C]`, each level drawn from its soft distribution, given those before."""
        at = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        ids = []
        for level in range(self.depth):
            book = self.codebook(level)
            probabilities = (-book.distances(x) / temperature).softmax(dim=-1)
            ids.append(inverse_cdf(probabilities, draws.uniform("code", at=at, level=level)))
            x = x - F.embedding(ids[-1], book.vectors)
        return torch.stack(ids, dim=-1)
