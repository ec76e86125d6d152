"""Verification: pure functions of the target's distributions, a proposal, uniforms and a policy.

Each is vectorised over samples. A tree takes a step per level and sibling, a chain none: all its nodes are tested at
once, and with them all ids of a node. A candidate is kept if its uniform is at most its odds, as officially; that a
uniform of exactly 0 would keep a candidate of probability 0 is not reproduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varzoo.samplers.speculative.policies import Lantern, Policy, Siblings
from varzoo.samplers.speculative.proposals import WITH, Proposal, Verdict


def verify(p: Tensor, proposal: Proposal, uniforms: Tensor, policy: Policy) -> Verdict:
    """Keep the part of a proposal that a policy allows.

    Args:
        p: `[B, n, w, V]` the target's distribution after each node.
        proposal: n nodes of w ids.
        uniforms: `[B, n, w]` in [0, 1), one for each node and id; node 0's are not used.
    """
    if proposal.tree.is_chain:
        return verify_chain(p, proposal, uniforms, policy)
    if proposal.tokens.shape[2] != 1:
        raise ValueError(f"nodes of {proposal.tokens.shape[2]} ids are verified in a chain: siblings would have to "
                         "agree in all of them. Draft one sequence.")
    return verify_tree(p[:, :, 0], proposal, uniforms[:, :, 0], policy)


def verify_tree(p: Tensor, proposal: Proposal, uniforms: Tensor, policy: Policy) -> Verdict:
    """Go down from node 0 as long as a child is kept; children are tested in the order of their nodes.

    Independent drafts that are alike are one node with the children of all (SpecTr's sequences that stay alive).

    Args:
        p: `[B, n, V]`; uniforms: `[B, n]`.
    """
    tokens, tree = proposal.tokens[..., 0], proposal.tree
    samples = torch.arange(len(tokens), device=tokens.device)
    children = tree.children(tokens if proposal.kind == WITH else None).expand(len(tokens), -1, -1)
    current, alive = torch.zeros_like(samples), torch.ones_like(samples, dtype=torch.bool)
    path = [current]
    following = p[:, 0]
    odds = torch.full_like(uniforms, torch.nan)
    skipped = torch.zeros_like(odds, dtype=torch.bool)
    for _ in range(tree.levels):
        candidates = children[samples, current]
        draft = proposal.draft_of(current[:, None])
        siblings = policy.enter(Siblings(p[samples, current], None if draft is None else draft[:, 0, 0], proposal.kind,
                                         (candidates >= 0).sum(dim=1)))
        found = torch.full_like(current, -1)
        for candidate in candidates.unbind(dim=1):
            testing = alive & (candidate >= 0) & (found < 0)
            if not testing.any():
                break
            node = candidate.clamp(min=0)
            x = tokens[samples, node]
            chance = policy.odds(siblings, x)
            possible = testing & (chance >= 0)
            kept = possible & (chance > 0) & (uniforms[samples, node] <= chance)
            odds[samples, node] = torch.where(possible, chance, odds[samples, node])
            skipped[samples, node] |= testing & ~possible
            found = torch.where(kept, node, found)
            siblings = policy.reject(siblings, x, possible & ~kept)
        went_on = alive & (found >= 0)
        ahead = torch.where((found >= 0)[:, None], p[samples, found.clamp(min=0)], policy.rest(siblings))
        following = torch.where(alive[:, None], ahead, following)
        current, alive = torch.where(went_on, found, current), went_on
        path.append(torch.where(went_on, found, -1))
    return Verdict(path=torch.stack(path, dim=1), following=following[:, None], odds=odds, skipped=skipped)


def verify_chain(p: Tensor, proposal: Proposal, uniforms: Tensor, policy: Policy) -> Verdict:
    """Keep the first nodes of a chain all of whose ids are kept.

    Of the first node that is not kept whole, ids that are kept are settled, and the others are drawn from what is left
    of their own distribution: ids of a node do not depend on each other.

    Args: see `verify`.
    """
    tokens, nodes = proposal.tokens, proposal.tree.nodes
    samples = torch.arange(len(tokens), device=tokens.device)
    if nodes == 1:
        nothing = torch.full((len(tokens), 1), torch.nan, device=p.device)
        return Verdict(path=torch.zeros_like(samples)[:, None], following=p[:, 0], odds=nothing,
                       skipped=torch.zeros_like(nothing, dtype=torch.bool))
    order = torch.arange(nodes, device=tokens.device)
    drafts = proposal.draft_of(order[:-1].expand(len(tokens), -1))
    x, once = tokens[:, 1:], torch.ones_like(tokens[:, 1:])
    chance = policy.odds(policy.enter(Siblings(p[:, :-1], drafts, proposal.kind, once)), x)
    kept = (chance > 0) & (uniforms[:, 1:] <= chance)
    count = kept.all(dim=2).cumprod(dim=1).sum(dim=1)

    stop = count.clamp(max=nodes - 2)  # the node before the first that was not kept whole
    siblings = policy.enter(Siblings(p[samples, stop], None if drafts is None else drafts[samples, stop],
                                     proposal.kind, once[:, 0]))
    x, kept, possible = x[samples, stop], kept[samples, stop], chance[samples, stop] >= 0
    left = policy.rest(policy.reject(siblings, x, possible & ~kept))
    left = torch.where((possible | kept)[..., None], left, siblings.p)
    settled = torch.zeros_like(left).scatter(-1, x[..., None], 1)
    left = torch.where(kept[..., None], settled, left)
    following = torch.where((count == nodes - 1)[:, None, None], p[:, -1], left)

    odds = torch.cat([torch.full_like(chance[:, :1, 0], torch.nan), chance.amin(dim=2)], dim=1)
    tested = (order > 0) & (order <= count[:, None] + 1)
    skipped = tested & (odds < 0)
    odds = odds.masked_fill(~tested | skipped, torch.nan)
    return Verdict(path=torch.where(order <= count[:, None], order, -1), following=following, odds=odds,
                   skipped=skipped)


def verify_greedy(logits: Tensor, proposal: Proposal, relaxation: Lantern | None = None) -> Verdict:
    """Temperature 0: keep a longest path of tokens that are each the likeliest after the one before.

    With a relaxation, each candidate alone may be raised by its neighbours' mass first. What follows is the likeliest
    by the target's own logits. Without a relaxation this is plain greedy decoding.

    Args:
        logits: `[B, n, w, V]` of the target after each node.
    """
    tokens, tree = proposal.tokens, proposal.tree
    samples = torch.arange(len(tokens), device=tokens.device)
    parents = tree.parents.clamp(min=0).expand(len(tokens), -1)
    best = logits.argmax(dim=-1)
    wanted = best[samples[:, None], parents]
    fits = wanted == tokens
    if relaxation is not None:
        probabilities = logits.softmax(dim=-1)[samples[:, None], parents]
        raised = relaxation.raised(probabilities, tokens)[0]
        fits = probabilities.scatter(-1, tokens[..., None], raised[..., None]).argmax(dim=-1) == tokens
    fits = fits.all(dim=2)
    fits[:, 0] = True
    for _ in range(tree.levels):
        fits = fits & fits.gather(1, parents)
    depth = tree.depth.expand(len(tokens), -1)
    preference = torch.arange(tree.nodes, device=tokens.device)[None] if proposal.preference is None \
        else proposal.preference
    score = (depth * (tree.nodes + 1) - preference).masked_fill(~fits, -1 - (tree.nodes + 1))
    last = score.argmax(dim=1)
    # The path to the last node: its ancestors, in ascending order, which is that of their depth.
    above = tree.lineage.expand(len(tokens), -1, -1)[samples, last]
    slots = torch.where(above, depth, tree.levels + 1)
    path = torch.full((len(tokens), tree.levels + 2), -1, device=tokens.device)
    path = path.scatter(1, slots, torch.arange(tree.nodes, device=tokens.device).expand_as(slots))[:, :-1]
    following = torch.zeros_like(logits[:, 0]).scatter(-1, best[samples, last][..., None], 1)
    tested = fits.gather(1, parents)
    tested[:, 0] = False
    odds = torch.where(tested, fits.float(), torch.nan)
    return Verdict(path=path, following=following, odds=odds, skipped=torch.zeros_like(fits))
