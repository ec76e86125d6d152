"""Jacobi decoding: the tests of SJD and GSD on windows of recorded distributions."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden_case import Case
from varzoo.core.draws import inverse_cdf
from varzoo.generators.trees import Tree
from varzoo.samplers.speculative.policies import Exact, Grouped, Policy
from varzoo.samplers.speculative.proposals import WITH, Proposal
from varzoo.samplers.speculative.verify import verify


def window(case: Case, policy: Policy) -> dict[str, Any]:
    """Verify every window, then put together what the official loop returns."""
    drafts, fresh, p, q = (case.inputs[name] for name in ("draft_tokens", "fresh_tokens", "p", "q"))
    length = drafts.shape[1]
    # The token of a node was drawn from q at its own place: the children of node i from row i + 1.
    proposal = Proposal(tokens=drafts[..., None], tree=Tree.chain(length), kind=WITH, q=q[:, :, None],
                        group=torch.arange(1, length + 1)[None])
    verdict = verify(p[:, :, None], proposal, case.inputs["u"][..., None], policy)
    first = verdict.accepted + 1
    resampled = inverse_cdf(verdict.following, case.inputs["u_resample"].clamp(min=0)[:, None])[:, 0]
    places = torch.arange(1, length + 1)
    kept = places < first[:, None]
    tokens = torch.where(kept, drafts.roll(-1, dims=1), fresh)
    tokens = torch.where((places == first[:, None]) & (first < length)[:, None], resampled[:, None], tokens)
    scores = torch.where(kept[..., None], q.roll(-1, dims=1), p)
    return {"first_rejected": first, "tokens": tokens, "scores": scores}


def gsd_verify(case: Case) -> dict[str, Any]:
    return window(case, Grouped().comparing(case.inputs["embed"]))


KINDS = {
    "specdec/sjd_verify": lambda case: window(case, Exact()),
    "specdec/gsd_verify": gsd_verify,
}
