"""Improved precision and recall (arXiv 1904.06991): how many samples lie on the references' manifold, and vice versa.

A manifold is the union of balls around its points, each reaching to the point's k-th neighbour. Distances are taken
tile by tile, so that 50,000 points need no 50,000 x 50,000 matrix; rows may be shared among processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.eval.features import full_precision

TILE = 4096


def squared_distances(a: Tensor, b: Tensor, *, half: bool = False) -> Tensor:
    """Squared Euclidean distances `[n, m]` of `[n, D]` and `[m, D]`, never negative.

    Args:
        half: as ADM's evaluator: in float16, and again in float32 if any of them is not finite.
    """
    if half:
        rough = _squared(a.half(), b.half())
        if rough.isfinite().all():
            return rough.float()
    return _squared(a.float(), b.float())


def _squared(a: Tensor, b: Tensor) -> Tensor:
    products = a @ b.T
    return (a.square().sum(1)[:, None] - 2 * products + b.square().sum(1)).clamp(min=0)


def neighbour_radii(points: Tensor, *, k: int = 3, half: bool = False, distributed: bool = False) -> Tensor:
    """Squared distance of every point to its k-th neighbour, itself not counted. `[n]`.

    Raises:
        ValueError: there are not k others.
    """
    if len(points) <= k:
        raise ValueError(f"the {k} nearest neighbours of a point need more than {k} points, got {len(points)}.")
    radii = torch.zeros(len(points))
    for rows in _own_tiles(len(points), distributed):
        nearest = torch.empty(len(rows), 0)
        for columns in torch.arange(len(points)).split(TILE):
            found = squared_distances(_take(points, rows), _take(points, columns), half=half)
            nearest = torch.cat([nearest, found], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False, sorted=True).values
        radii[rows] = nearest[:, k]
    return _summed(radii, distributed)


def share_inside(points: Tensor, centres: Tensor, radii: Tensor, *, half: bool = False,
                 distributed: bool = False) -> float:
    """Share of the points that lie within the radius of any centre."""
    inside = torch.zeros(())
    for rows in _own_tiles(len(points), distributed):
        found = torch.zeros(len(rows), dtype=torch.bool)
        for columns in torch.arange(len(centres)).split(TILE):
            distances = squared_distances(_take(points, rows), _take(centres, columns), half=half)
            found |= (distances <= radii[columns]).any(1)
        inside += found.sum()
    return float(_summed(inside, distributed)) / len(points)


def precision_recall(samples: Tensor, references: Tensor, *, k: int = 3, half: bool = False,
                     distributed: bool = False) -> tuple[float, float]:
    """Precision and recall of sample features `[n, D]` against reference features `[m, D]`.

    Where `distributed`, every process must hold all features and call this; rows are shared out.
    """
    with full_precision():
        reference_radii = neighbour_radii(references, k=k, half=half, distributed=distributed)
        sample_radii = neighbour_radii(samples, k=k, half=half, distributed=distributed)
        return (share_inside(samples, references, reference_radii, half=half, distributed=distributed),
                share_inside(references, samples, sample_radii, half=half, distributed=distributed))


def _take(points: Tensor, rows: Tensor) -> Tensor:
    return points[int(rows[0]):int(rows[-1]) + 1]  # a view: features on disk are read tile by tile


def _own_tiles(count: int, distributed: bool) -> list[Tensor]:
    """Row numbers of this process's tiles."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    return list(torch.arange(count).split(min(TILE, -(-count // world))))[rank::world]


def _summed(values: Tensor, distributed: bool) -> Tensor:
    if distributed:
        dist.all_reduce(values)
    return values
