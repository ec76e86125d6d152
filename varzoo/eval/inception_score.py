"""Inception score (arXiv 1606.03498), streamed exactly: exp of the mean KL between p(y|x) and p(y), by splits.

Which split a sample belongs to is decided by its global index, so the score does not depend on batches or processes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.eval.moments import SampleSet


def shuffled_splits(count: int, *, splits: int = 10, seed: int = 2020) -> Tensor:
    """torch-fidelity's rule: equal splits of a seeded shuffle (NumPy's RandomState). `[count]` int64."""
    assignment = torch.empty(count, dtype=torch.int64)
    assignment[torch.from_numpy(np.random.RandomState(seed).permutation(count))] = equal_splits(count, splits=splits)
    return assignment


def equal_splits(count: int, *, splits: int = 10) -> Tensor:
    """Consecutive splits of equal size, split k from k count // splits on. `[count]` int64."""
    if not 1 <= splits <= count:
        raise ValueError(f"{count} samples cannot be divided into {splits} splits; score more or use fewer splits.")
    bounds = torch.tensor([number * count // splits for number in range(1, splits)])
    return torch.bucketize(torch.arange(count), bounds, right=True)


def consecutive_splits(count: int, *, size: int = 5000) -> Tensor:
    """ADM's rule: consecutive splits of `size` samples, the last may be short. `[count]` int64.

    Only meaningful for samples whose classes come in random order.
    """
    return torch.arange(count) // size


class InceptionScore:
    """Streaming sums of the inception score: per split n, sum of p and sum of p log p, in float64.

    Args:
        classes: number of classes C of the classifier.
        assignment: split of every sample of the set `[count]`; indices beyond are padding and are left out.
        device: where the sums live.
    """

    def __init__(self, *, classes: int, assignment: Tensor, device: torch.device | str = "cpu") -> None:
        self.classes, self.assignment = classes, assignment
        self.samples = SampleSet(len(assignment))
        splits = int(assignment.max()) + 1
        self.number = torch.zeros(splits, dtype=torch.float64, device=device)
        self.probability = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(splits, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, index: Tensor | None = None) -> None:
        """Add samples.

        Args:
            logits: `[B, C]`.
            index: global sample indices `[B]`; without them, samples are taken to come in order.
        """
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            raise ValueError(f"logits must be [B, {self.classes}], got {tuple(logits.shape)}.")
        index = self.samples.next_indices(len(logits)) if index is None else index.detach().cpu()
        fresh = self.samples.fresh(index)
        device = self.number.device
        log_p = logits[fresh.to(logits.device)].to(device, torch.float64).log_softmax(-1)
        split = self.assignment[index[fresh]].to(device)
        p = log_p.exp()
        self.number.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.probability.index_add_(0, split, p)
        self.negentropy.index_add_(0, split, (p * log_p).sum(-1))

    def merge(self, other: InceptionScore) -> None:
        """Add the samples of another shard, which must have the same assignment."""
        self.samples.merge(other.samples)
        for own, theirs in zip(self._sums(), other._sums()):
            own += theirs.to(own.device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the sums by those over all processes."""
        self.samples.all_reduce(group, self.number.device)
        for own in self._sums():
            dist.all_reduce(own, group=group)

    def result(self) -> tuple[float, float]:
        """Mean and population standard deviation over the splits. Raises ValueError unless the set is complete."""
        if len(self.samples) != len(self.assignment):
            raise ValueError(f"an inception score over {len(self.assignment)} samples needs all of them, got "
                             f"{len(self.samples)}.")
        marginal = self.probability / self.number[:, None]
        scores = (self.negentropy / self.number - torch.xlogy(marginal, marginal).sum(-1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.samples.seen.clone(), "number": self.number.clone(),
                "probability": self.probability.clone(), "negentropy": self.negentropy.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.seen = state["seen"].clone()
        for name in ("number", "probability", "negentropy"):
            getattr(self, name).copy_(state[name])

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.number, self.probability, self.negentropy
