"""When a drafted token is kept, and what is drawn instead of one that is not.

A policy is a pure function of distributions: p `[..., V]` of the target and q `[..., V]` of the draft (None where the
draft chose instead of drawing: a point mass), for the candidates x `[...]` of one place, which are tested one after
the other. Policies differ in the probability of acceptance (`odds`) and in what is left of p after a rejection
(`residual`).

    policy          | sampled tokens are distributed as the target says
    --------------- | ------------------------------------------------------------------------------------------------
    Exact           | yes (arXiv 2211.17192; siblings with and without replacement: SpecInfer, EAGLE, Sequoia)
    KSequential     | yes (SpecTr, arXiv 2310.15141)
    Lantern         | no: a test moves at most the bound's mass (arXiv 2410.03355, 2502.06352)
    Grouped         | no (GSD, arXiv 2508.07747)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from varzoo.core.errors import unknown
from varzoo.samplers.speculative.proposals import POINT, WITH, WITHOUT


@dataclass(frozen=True)
class Siblings:
    """The candidates of one place that are still to be tested.

    Args:
        p: `[..., V]` what is left of the target's distribution.
        q: `[..., V]` the draft's for the next of them, None for a point mass.
        kind: how they were chosen, see `Proposal`.
        count: `[...]` how many there are in all.
    """

    p: Tensor
    q: Tensor | None
    kind: str
    count: Tensor

    @property
    def drawn_from(self) -> Tensor:
        """q, of candidates that were drawn."""
        assert self.q is not None, "a draft that draws says from what"
        return self.q


def at(values: Tensor, x: Tensor) -> Tensor:
    """The entries x `[...]` of rows `[..., V]`."""
    return values.gather(-1, x[..., None])[..., 0]


def normalised(mass: Tensor) -> Tensor:
    """Rows that sum to 1; a row of zeros becomes uniform, as officially."""
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total, 1 / mass.shape[-1])


class Policy(ABC):
    """Base of all policies.

    Attributes:
        kinds: ways in which children may have been chosen (`Proposal.kind`).
        exact: whether what is sampled is distributed as the target says.
        needs_codebook, needs_embeddings: whether it compares codes by the tokenizer's vectors (`use_codebook`), or by
            the rows of the generator's input embedding (`comparing`).
    """

    kinds: frozenset[str] = frozenset({POINT, WITHOUT, WITH})
    exact: ClassVar[bool] = False
    needs_codebook: ClassVar[bool] = False
    needs_embeddings: ClassVar[bool] = False

    def enter(self, siblings: Siblings) -> Siblings:
        """Look at the candidates of a place before the first is tested."""
        return siblings

    @abstractmethod
    def odds(self, siblings: Siblings, x: Tensor) -> Tensor:
        """The probability `[...]` to keep x; it may exceed 1, and is -1 where the draft gives x no probability."""

    @abstractmethod
    def residual(self, siblings: Siblings, x: Tensor) -> Tensor:
        """What is left of p `[..., V]` once x is rejected, normalised."""

    def reject(self, siblings: Siblings, x: Tensor, rejected: Tensor) -> Siblings:
        """Go on to the next candidate where x was `rejected` `[...]`."""
        where = rejected[..., None]
        p, q = torch.where(where, self.residual(siblings, x), siblings.p), siblings.q
        if siblings.kind == WITHOUT:
            left = siblings.drawn_from.scatter(-1, x[..., None], 0)
            left = left / left.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
            q = torch.where(where, left, siblings.drawn_from)
        return replace(siblings, p=p, q=q)

    def rest(self, siblings: Siblings) -> Tensor:
        """What to draw from once every candidate has been rejected."""
        return siblings.p

    def odds_of(self, mass: Tensor, siblings: Siblings, x: Tensor) -> Tensor:
        """A mass `[...]` over the draft's probability of x, -1 where that is none."""
        if siblings.q is None:
            return mass
        q = at(siblings.q, x)
        return torch.where(q > 0, mass / q, -1.0)


class Exact(Policy):
    """Speculative sampling (arXiv 2211.17192, 2302.01318): keep x with p(x) / q(x), else draw from (p - q)+."""

    exact = True

    def odds(self, siblings: Siblings, x: Tensor) -> Tensor:
        return self.odds_of(at(siblings.p, x), siblings, x)

    def residual(self, siblings: Siblings, x: Tensor) -> Tensor:
        if siblings.q is None:
            return normalised(siblings.p.scatter(-1, x[..., None], 0))
        return normalised((siblings.p - siblings.q).clamp(min=0))


@dataclass(frozen=True)
class RhoSiblings(Siblings):
    """With SpecTr's factor rho `[..., 1]` for all candidates of a place."""

    rho: Tensor


class KSequential(Policy):
    """SpecTr's k-sequential selection (arXiv 2310.15141, algorithm 3; after the paper alone).

    K independent drafts are each kept with p(x) / (rho q(x)), rho in [1, K] being the least for which what is drawn
    after K rejections is a distribution: the root of 1 - (1 - beta)^K = rho beta, beta = sum min(q, p / rho).
    """

    kinds = frozenset({WITH})
    exact = True
    bisections: ClassVar[int] = 30  # of an interval of length K - 1, in float32

    def enter(self, siblings: Siblings) -> RhoSiblings:
        count = siblings.count[..., None].clamp(min=1).float()
        low, high = torch.ones_like(count), count
        for _ in range(self.bisections):
            middle = (low + high) / 2
            beta = self._beta(siblings, middle)
            above = 1 - (1 - beta) ** count > middle * beta  # the root is higher
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return RhoSiblings(siblings.p, siblings.q, siblings.kind, siblings.count, high)

    def odds(self, siblings: Siblings, x: Tensor) -> Tensor:
        return self.odds_of(at(siblings.p / self._rho(siblings), x), siblings, x)

    def residual(self, siblings: Siblings, x: Tensor) -> Tensor:
        return siblings.p  # the same test for all

    def rest(self, siblings: Siblings) -> Tensor:
        count, rho = siblings.count[..., None], self._rho(siblings)
        kept, beta = torch.minimum(siblings.drawn_from, siblings.p / rho), self._beta(siblings, rho)
        share = (1 - (1 - beta) ** count) / beta.clamp(min=torch.finfo(beta.dtype).tiny)
        return torch.where(count > 0, normalised((siblings.p - kept * share).clamp(min=0)), siblings.p)

    @staticmethod
    def _rho(siblings: Siblings) -> Tensor:
        assert isinstance(siblings, RhoSiblings), "a place is entered before its candidates are tested"
        return siblings.rho

    @staticmethod
    def _beta(siblings: Siblings, rho: Tensor) -> Tensor:
        return torch.minimum(siblings.drawn_from, siblings.p / rho).sum(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Additive:
    """LANTERN's bound: neighbours may add up to `delta` in all, the total variation of one test."""

    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise ValueError(f"an additive bound delta is in [0, 1], got {self.delta:g}; a multiplicative one is "
                             "Multiplicative(factor=...) with a factor above 1.")

    def __call__(self, probability: Tensor) -> Tensor:
        return torch.full_like(probability, self.delta)


@dataclass(frozen=True, kw_only=True)
class Multiplicative:
    """LANTERN++'s bound: the probability, neighbours included, may be up to `factor` times its own."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError(f"a multiplicative bound has a factor above 1, got {self.factor:g}; an additive one is "
                             "Additive(delta=...).")

    def __call__(self, probability: Tensor) -> Tensor:
        return (self.factor - 1) * probability


RULES = {
    # name: kinds of siblings it is for, and what loses the entries of near codes
    "dynamic": (frozenset({POINT}), "target"),
    "static": (frozenset({WITHOUT, WITH}), "draft"),
    "lumina_static": (frozenset({WITHOUT, WITH}), "target"),
    "paper": (frozenset({POINT, WITHOUT, WITH}), "moved"),
}


class Lantern(Policy):
    """Relaxed acceptance: x is kept with the mass of its nearest codes, as many of them as a bound allows.

    Args:
        bound: `Additive` (LANTERN, arXiv 2410.03355) or `Multiplicative` (LANTERN++, arXiv 2502.06352).
        k: how many of the nearest codes may be counted.
        rule: what is left after a rejection. The official code has three branches, the paper a fourth:
            "dynamic" (point masses): p without x and, if any neighbour was counted, without its k + 1 nearest codes;
            "static": (p - q)+, where q loses its k + 1 nearest codes if any was counted;
            "lumina_static": (p - q)+, where p loses them;
            "paper": (p' - q)+, where p' is p with the mass of the neighbours that were counted moved to x.

    The nearest k + 1 are one more than are ever counted: x itself is not among them, which the official slice forgets.
    Only the rule of the paper keeps what one candidate's test and residual sample within the bound of p, in total
    variation; "dynamic" moves the whole mass of the k + 1 nearest.
    """

    needs_codebook = True

    def __init__(self, *, bound: Additive | Multiplicative, k: int, rule: str) -> None:
        if rule not in RULES:
            raise unknown("rule of rejection", rule, RULES)
        if k < 1:
            raise ValueError(f"LANTERN counts k >= 1 of the nearest codes, got k={k}; without any it is Exact().")
        self.bound, self.k, self.rule = bound, k, rule
        self.kinds, self.loser = RULES[rule]
        self.table: Tensor | None = None

    def use_table(self, table: Tensor) -> None:
        """Take the codes' neighbours, `[V, k + 1 or more]` (V - 1 where there are no more)."""
        size = len(table)
        if not self.k <= size - 1:
            raise ValueError(f"k={self.k} nearest codes were asked for, but a codebook of {size} codes has only "
                             f"{size - 1} others of each: lower k.")
        self.table = table

    def columns(self, size: int) -> int:
        """How many neighbours of each of `size` codes it looks at."""
        return min(self.k + 1, size - 1) if self.k < size else self.k

    def odds(self, siblings: Siblings, x: Tensor) -> Tensor:
        return self.odds_of(self.raised(siblings.p, x)[0], siblings, x)

    def raised(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(x) with the mass of the nearest codes, `[...]`, and whether any was counted.

        The nearest are counted in order, until the next would exceed the bound.
        """
        own = at(p, x)
        mass, counted = self._counted(p, x)
        return own + torch.where(counted > 0, at(mass, (counted - 1).clamp(min=0)), 0.0), counted > 0

    def _counted(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mass of the first neighbours `[..., k]`, and how many of them are counted `[...]`."""
        mass = p.gather(-1, self._nearest(x, self.k)).cumsum(dim=-1)
        return mass, (mass <= self.bound(at(p, x))[..., None]).sum(dim=-1)  # mass never falls: these are the first

    def residual(self, siblings: Siblings, x: Tensor) -> Tensor:
        p, q, itself = siblings.p, siblings.q, x[..., None]
        if self.loser == "moved":
            near, counted = self._nearest(x, self.k), self._counted(p, x)[1][..., None]
            gone = torch.arange(self.k, device=x.device) < counted
            p = p.scatter(-1, near, p.gather(-1, near).masked_fill(gone, 0)).scatter(
                -1, itself, self.raised(p, x)[0][..., None])
        else:
            near, counted = self._nearest(x, self.k + 1), self.raised(p, x)[1][..., None]
            if self.loser == "target":
                p = torch.where(counted, p.scatter(-1, near, 0), p)
            else:
                q = torch.where(counted, siblings.drawn_from.scatter(-1, near, 0), siblings.drawn_from)
        return normalised(p.scatter(-1, itself, 0) if q is None else (p - q).clamp(min=0))

    def _nearest(self, x: Tensor, count: int) -> Tensor:
        if self.table is None:
            raise ValueError("LANTERN compares codes and has no codebook yet: compose it with a tokenizer, as "
                             "Model(...) does, or call sampler.use_codebook(tokenizer.stored_codebook()).")
        if self.table.device != x.device:
            self.table = self.table.to(x.device)
        return self.table[:, :count][x]


class Grouped(Policy):
    """Grouped speculative decoding (arXiv 2508.07747): the masses of similar tokens are compared, not of one.

    Official code: junhyukso/GSD. Of the tokens ranked from 7 below to 6 above x by the target's probability, the
    group has those whose probability is within 0.15 of x's and whose input embeddings are within a squared distance of
    0.5. Where x is among the 7 least likely, the official window is empty and the test the plain one; where ids of the
    window exceed 10,000, distances do not count. The residual is the ordinary one, so nothing is exact.
    """

    kinds = frozenset({WITH})
    needs_embeddings = True
    below: ClassVar[int] = 7
    above: ClassVar[int] = 6
    nearness: ClassVar[float] = 0.15
    distance: ClassVar[float] = 0.5
    largest_id: ClassVar[int] = 10000

    def __init__(self, embeddings: Tensor | None = None) -> None:
        self.embeddings = embeddings

    def comparing(self, embeddings: Tensor) -> Grouped:
        """This policy for a target with the given input embeddings `[V, C]`."""
        return Grouped(embeddings)

    def odds(self, siblings: Siblings, x: Tensor) -> Tensor:
        assert self.embeddings is not None, "a sampler compares by its target's embeddings"
        p, q = siblings.p, siblings.drawn_from
        order = p.argsort(dim=-1, stable=True)
        rank = (order == x[..., None]).int().argmax(dim=-1, keepdim=True)
        window = rank + torch.arange(-self.below, self.above + 1, device=x.device)
        inside = (window >= 0) & (window < p.shape[-1])
        ids = order.gather(-1, window.clamp(0, p.shape[-1] - 1))
        near = (self.embeddings[x][..., None, :] - self.embeddings[ids]).square().sum(dim=-1) < self.distance
        known = ((ids <= self.largest_id) | ~inside).all(dim=-1, keepdim=True)
        group = inside & (near | ~known) & ((p.gather(-1, ids) - at(p, x)[..., None]).abs() < self.nearness)
        plain = self.odds_of(at(p, x), siblings, x)
        masses = [(values.gather(-1, ids) * group).sum(dim=-1) for values in (p, q)]
        grouped = torch.where(masses[1] > 0, masses[0] / masses[1].clamp(min=torch.finfo(q.dtype).tiny), -1.0)
        return torch.where(rank[..., 0] < self.below, plain, grouped)

    def residual(self, siblings: Siblings, x: Tensor) -> Tensor:
        return normalised((siblings.p - siblings.drawn_from).clamp(min=0))
