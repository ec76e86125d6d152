"""LANTERN: rules of acceptance, trees, the drafter, and whole runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant
from varzoo.generators.base import Condition
from varzoo.generators.conditioners import TextPrefix
from varzoo.generators.drafter import Drafter
from varzoo.generators.llamagen import LlamaGen
from varzoo.generators.ragged import Outlook, Ragged, RaggedDecoding
from varzoo.generators.trees import Tree
from varzoo.nn.llama import Sight, SwiGLU
from varzoo.predictions.categorical import filtered
from varzoo.samplers import Autoregressive
from varzoo.samplers.speculative import (
    Additive,
    DynamicTree,
    Eagle,
    Exact,
    Lantern,
    ModelDraft,
    Multiplicative,
    Speculative,
    StaticTree,
)
from varzoo.samplers.speculative.neighbours import neighbour_table
from varzoo.samplers.speculative.policies import Policy, Siblings, at
from varzoo.samplers.speculative.proposals import POINT, WITHOUT, Proposal, Verdict
from varzoo.samplers.speculative.sampler import Speculation
from varzoo.samplers.speculative.shapes import Processing, Shape, without_replacement
from varzoo.samplers.speculative.verify import verify_greedy, verify_tree


def policy_of(relaxed: bool, k: int, delta: float, rule: str, codebook: Tensor) -> Policy:
    """The official settings: a delta above 1 is a factor."""
    if not relaxed:
        return Exact()
    bound = Multiplicative(factor=delta) if delta > 1 else Additive(delta=delta)
    policy = Lantern(bound=bound, k=k, rule=rule)
    policy.use_table(neighbour_table(codebook))
    return policy


def processed(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits `[..., V]` after temperature, top-p and top-k, in LANTERN's order, then the softmax."""
    return filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p,
                    filters=("top_p", "top_k")).softmax(dim=-1)


def accept_rows(case: Case, rule: str) -> dict[str, Any]:
    """One candidate after the root in every row."""
    inputs = case.inputs
    outputs: dict[str, list[Tensor]] = {"p": [], "accept_prob": [], "accepted": [], "sample_p": []}
    for row in range(len(inputs["draft_token"])):
        relaxed, k = bool(inputs["lantern"][row]), int(inputs["k"][row])
        policy = policy_of(relaxed, k, float(inputs["delta"][row]), rule, inputs["codebook"])
        settings = {}
        if "temperature" in inputs:
            settings = {"temperature": float(inputs["temperature"][row]), "top_k": int(inputs["top_k"][row])}
        p = processed(torch.stack([inputs["logits"][row], inputs["next_logits"][row]]), **settings)
        x = inputs["draft_token"][row]
        q = inputs["q"][row][None, None, None] if "q" in inputs else None
        proposal = Proposal(tokens=torch.stack([torch.zeros_like(x), x])[None, :, None], tree=Tree.chain(2),
                            kind=POINT if q is None else WITHOUT, q=q, group=torch.zeros(1, 2, dtype=torch.long))
        verdict = verify_tree(p[None], proposal, inputs["u"][row].expand(1, 2), policy)
        outputs["p"].append(p[0])
        outputs["accept_prob"].append(verdict.odds[0, 1].nan_to_num(nan=-1))
        outputs["accepted"].append(verdict.accepted[0])
        outputs["sample_p"].append(verdict.following[0, 0])
    return {name: torch.stack(values) for name, values in outputs.items()}


def accept_greedy(case: Case) -> dict[str, Any]:
    """The paths of a row have logits of their own, so each is verified by itself; the first longest is the best."""
    inputs = case.inputs
    outputs: dict[str, list[Tensor]] = {"best": [], "accept_length": [], "next_logits": []}
    for row, (candidates, logits) in enumerate(zip(inputs["candidates"], inputs["logits"])):
        policy = policy_of(bool(inputs["lantern"][row]), int(inputs["k"][row]), float(inputs["delta"][row]), "dynamic",
                           inputs["codebook"])
        accepted = []
        for path, rows in zip(candidates, logits):
            valid = int((path >= 0).sum())
            proposal = Proposal(tokens=path[None, :valid, None], tree=Tree.chain(valid), kind=POINT)
            verdict = verify_greedy(rows[None, :valid, None], proposal, policy if isinstance(policy, Lantern) else None)
            accepted.append(verdict.accepted[0])
        length, best = torch.stack(accepted).max(dim=0)
        best = torch.stack(accepted).eq(length).int().argmax()
        outputs["best"].append(best)
        outputs["accept_length"].append(length)
        outputs["next_logits"].append(logits[best, length])
    return {name: torch.stack(values) for name, values in outputs.items()}


def static_tree(case: Case) -> dict[str, Any]:
    """The official buffers from our tree: nodes, parents, ranks and which nodes the drafter is fed."""
    shape, drawn = StaticTree(paths=case.config["tree"]), case.config["TOPK"]
    plan = shape.on(torch.device("cpu"))
    level_of = {node: shape.depth[node] for node in shape.inner}
    group = [-1, *(sum(level_of[other] == level_of[parent] and other < parent for other in shape.inner)
                   for parent in shape.parents[1:])]
    brothers = [[other for other in range(1, node) if shape.parents[other] == shape.parents[node]]
                for node in range(shape.nodes)]
    paths = leaf_paths(shape.parents, ordered=True)
    widest = max(map(len, brothers)) or 1
    padded = lambda nodes: nodes + [-1] * (widest - len(nodes))  # noqa: E731
    outputs = {
        "tree_attn_mask": plan.tree.lineage[0], "tree_position_ids": plan.tree.depth[0],
        "tree_indices": torch.tensor([0, *(1 + shape.rank[node] + drawn * shape.inner.index(shape.parents[node])
                                           for node in range(1, shape.nodes))]),
        "retrieve_indices": paths, "p_indices": torch.tensor(group)[paths],
        "b_indices": torch.tensor([[padded(brothers[node] if node >= 0 else []) for node in path]
                                   for path in paths.tolist()])}
    levels, end = [level for level in plan.levels if len(level.fed)], 1
    for number, level in enumerate(levels):
        start, end = end, end + len(level.fed)
        chosen = level.group[level.fed]
        outputs |= {f"draft_mask_{number}": level.tree.lineage[0, start:end, 1:end],
                    f"draft_indices_{number}": chosen * drawn + level.rank[level.fed],
                    f"draft_repeat_{number}": torch.tensor([count for count in chosen.bincount().tolist() if count])}
    return outputs | {"draft_levels": len(levels)}


def leaf_paths(parents: list[int], ordered: bool) -> Tensor:
    """Nodes from the root to every leaf, -1 after it: by leaf, or, `ordered`, lexicographically with -1 last."""
    rows = []
    for leaf in range(len(parents)):
        if leaf not in parents:
            row = [leaf]
            while row[0]:
                row.insert(0, parents[row[0]])
            rows.append(row)
    if ordered:
        rows.sort(key=lambda row: [*row, len(parents)])
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def build(case: Case) -> tuple[LlamaGen, Drafter]:
    """Target and drafter; the target's body stays as initialised where the case has only its head."""
    config = case.config
    width, heads, grid = config["hidden_size"], config["num_attention_heads"], config.get("grid")
    if grid is None:
        grid = [round(config["block_size"] ** 0.5)] * 2
    spec = TokenSpec(kind="discrete", shape=tuple(grid), size=config["vocab_size"])
    conditioner = TextPrefix(length=config["cls_token_num"], channels=config["caption_dim"], width=width, drop=0.1,
                             padding_sees="crossed")
    target = LlamaGen(spec=spec, conditioner=conditioner, width=width, depth=config["num_hidden_layers"], heads=heads,
                      norm_eps=config["rms_norm_eps"], multiple_of=16)
    for block in target.stack.blocks:  # the case's are narrower than the rule of all released sizes says
        block.mlp = SwiGLU(width=width, hidden=config["intermediate_size"], dropout=0.0)
    parts = {"base.": {}, "drafter.": {}}
    for name, tensor in case.state_dict.items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][name.removeprefix(prefix)] = tensor
    state = target.key_maps()["lantern"].to_ours(parts["base."])
    if len(state) > 1:
        load_strictly(target, state | {"conditioner.null_features": case.inputs["uncond_embedding"]}, "the golden case")
        back = target.key_maps()["lantern"].to_official(target.state_dict())
        assert set(parts["base."]) == set(back) - {"model.cls_embedding.uncond_embedding"}
    else:
        target.load_state_dict(state, strict=False)
    drafter = Drafter(spec=spec, width=width, depth=config["drafter_num_hidden_layers"], heads=heads,
                      hidden=config["intermediate_size"], norm_eps=config["rms_norm_eps"],
                      bias=config["drafter_bias"], table="embedding", noise=0.2, logits_weight=config.get("p_w", 0.1),
                      drop=0.1)
    if parts["drafter."]:
        load_strictly(drafter, drafter.key_maps()["eagle"].to_ours(parts["drafter."]), "the golden drafter")
    return target.eval(), drafter.eval()


def condition_of(case: Case) -> Condition:
    """The caption, whose real tokens come first officially, turned so that they come last; padding is zero."""
    mask = case.inputs["caption_mask"].bool()
    features = case.inputs["caption_emb"] * mask[..., None]
    return Condition.text(features.roll(mask.shape[1] - int(mask.sum()), dims=1), mask.flip(1))


def opened(target: LlamaGen, condition: Condition, scale: float) -> RaggedDecoding:
    return target.begin(condition, draws=Draws(0, (0,)), guidance=Constant(scale), plan=Ragged(nodes=128, levels=16))


def drafted(case: Case, shape: Shape, processing: Processing, draws: Any) -> list[tuple[Proposal, list[Tensor]]]:
    """Proposals after each of the case's calls, and the logits they grew from."""
    target, drafter = build(case)
    inputs, text = case.inputs, case.config["cls_token_num"]
    decoding = opened(target, Condition.text(torch.zeros(1, text, case.config["caption_dim"]), torch.ones(1, text)),
                      case.config["cfg"])
    decoding.prefill()
    decoding.admit(inputs["ids"][:1, text:text + 1])
    model = Eagle(drafter=drafter)
    model.check(target)
    state = model.begin(decoding, Outlook(logits=None, features=inputs["hidden"][:, None, :text]),
                        condition=None, draws=None, guidance=None, nodes=shape.fed, levels=shape.levels)
    recorded, proposals = [], []
    for name in ("root", "grow"):
        method = getattr(state, name)
        setattr(state, name, lambda *given, method=method: recorded.append(method(*given)) or recorded[-1])
    for call, features in (("", inputs["hidden"][:, text:]), ("2", inputs.get("hidden2"))):
        if features is None:
            continue
        ids = inputs[f"ids{call}"][0, text:]
        count = features.shape[1]
        if count:
            fresh = ids[len(ids) - 1 - count:-1][None, :, None]
            decoding.verify(fresh, Tree.chain(count))
            verdict = Verdict(path=torch.arange(count)[None], following=None, odds=None, skipped=None)
            decoding.keep(verdict.path, ids[None, -1:])
            state.follow(None, verdict, Outlook(logits=None, features=features[:, None]))
        proposals.append((shape.grow(state, decoding.pending, decoding.known, processing, draws), list(recorded)))
        recorded.clear()
    return proposals


def processing_of(temperature: float, top_k: int = 0, top_p: float = 1.0) -> Processing:
    return Processing(options={"temperature": temperature, "top_k": top_k, "top_p": top_p,
                               "filters": ("top_p", "top_k")})


def draft_dynamic(case: Case) -> dict[str, Any]:
    config = case.config
    shape = DynamicTree(top_k=config["top_k"], depth=config["depth"], total=config["total_tokens"])
    processing, outputs = processing_of(config["temperature"], config["processor_top_k"]), {}
    for call, (proposal, _) in enumerate(drafted(case, shape, processing, None), start=1):
        outputs |= {f"draft_tokens_{call}": proposal.tokens[0, :, 0],
                    f"retrieve_indices_{call}": leaf_paths(proposal.tree.parents[0].tolist(), not processing.greedy),
                    f"tree_mask_{call}": proposal.tree.lineage[0],
                    f"tree_position_ids_{call}": proposal.tree.depth[0]}
    return outputs


@torch.no_grad()
def draft_static(case: Case) -> dict[str, Any]:
    config, drawn = case.config, case.config["TOPK"]
    shape, processing = StaticTree(paths=config["tree"]), processing_of(config["temperature"])
    gumbels = [case.inputs[f"gumbel_{level}"] for level in range(shape.levels)] if not processing.greedy else []
    [(proposal, logits)] = drafted(case, shape, processing, Replayed(gumbels=list(gumbels)))
    nodes, paths = proposal.tokens[0, :, 0], leaf_paths(shape.parents, ordered=True)
    outputs = {"candidates": torch.where(paths >= 0, nodes[paths], -1), "tree_candidates": nodes}
    if processing.greedy:
        return outputs | {"tokens": torch.cat(logits, dim=1)[0, :, 0].topk(drawn).indices}
    q = proposal.q[0, :, 0]
    sizes = [len(gumbel) for gumbel in gumbels]
    tokens = without_replacement(q, torch.cat(gumbels), drawn)
    odds = []
    for group, ids in enumerate(tokens):  # by the verifier's own recursion
        siblings = Siblings(q[group][None], q[group][None], WITHOUT, torch.tensor([drawn]))
        for x in ids:
            odds.append(at(siblings.q, x[None])[0])
            siblings = Exact().reject(siblings, x[None], torch.tensor([True]))
    probs = torch.stack(odds).view(-1, drawn)
    own = torch.tensor([1.0, *(probs[shape.inner.index(shape.parents[node]), shape.rank[node]]
                               for node in range(1, shape.nodes))])
    outputs |= {f"dist_{level}": part for level, part in enumerate(q.split(sizes))}
    return outputs | {"tokens": tokens, "probs": probs, "candidate_probs": torch.where(paths >= 0, own[paths], 1.0)}


def drafter_forward(case: Case) -> dict[str, Any]:
    """The sequence in two chunks through the cache, then tree nodes after the first chunk."""
    target, drafter = build(case)
    inputs, chunk = case.inputs, 20
    hidden, ids, places = inputs["hidden"], inputs["ids"], inputs["positions"] + 1
    length, text = hidden.shape[1], case.config["cls_token_num"]
    cache, slots = drafter.new_cache(2, length), torch.arange(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    parts = []
    for part in (slice(0, chunk), slice(chunk, length)):
        cache.reach = part.stop
        parts.append(drafter(hidden[:, part], ids[:, part], target.rows(places[part]), cache=cache, slots=slots[part],
                             sight=Sight(mask=causal[part, :part.stop])))
    out = torch.cat(parts, dim=1)
    nodes = inputs["tree_ids"].shape[1]
    mask = torch.cat([torch.ones(nodes, chunk), inputs["tree_mask"]], dim=1).bool()
    cache.reach = chunk + nodes
    out_tree = drafter(inputs["tree_hidden"], inputs["tree_ids"], target.rows(inputs["tree_positions"] + 1),
                       sight=Sight(mask=mask), cache=cache, slots=chunk + torch.arange(nodes))
    decoding = opened(target, Condition.text(torch.zeros(1, text, case.config["caption_dim"]), torch.ones(1, text)),
                      case.config["cfg"])
    return {"out": out, "logits": target.project(0, out), "out_tree": out_tree,
            "cfg_logits": decoding.score(out[:, None], torch.zeros(1, length, dtype=torch.long))[:, :, 0],
            "freqs": target.rows(torch.arange(100, 160) + 1)}


def drafter_loss(case: Case) -> dict[str, Any]:
    target, drafter = build(case)
    inputs = case.inputs
    length = inputs["ids"].shape[1]
    mask = torch.ones(length, length).tril().bool() & inputs["attention_mask"][:, None, None].bool()
    predicted = drafter(inputs["hidden"], inputs["ids"], target.rows(torch.arange(length) + 1), sight=Sight(mask=mask))
    losses = drafter.losses(predicted, inputs["target"], target.head, inputs["loss_mask"].float())
    return {"vloss": losses.parts["feature"], "ploss": losses.parts["logits"], "loss": losses.total}


def tree_verify(case: Case) -> dict[str, Any]:
    target, _ = build(case)
    inputs, text = case.inputs, case.config["cls_token_num"]
    shape = StaticTree(paths=case.config["tree"])
    decoding = opened(target, condition_of(case), case.config["cfg"])
    prefill = decoding.prefill()
    decoding.admit(inputs["prefix"][:, :1])
    count = inputs["prefix"].shape[1]
    before = decoding.verify(inputs["prefix"][..., None], Tree.chain(count))
    decoding.keep(torch.arange(count)[None], inputs["tree_tokens"][:, :1])
    outlook = decoding.verify(inputs["tree_tokens"][..., None], shape.on(torch.device("cpu")).tree)
    paths = leaf_paths(shape.parents, ordered=True)
    path = paths[case.config["leaf"], :case.config["accept_length"] + 1]
    rows = slice(text - 2, text - 2 + case.outputs["kv_before"].shape[3])

    def stored() -> Tensor:
        cache = decoding._cache
        return torch.stack([cache.keys, cache.values], dim=1).flatten(0, 1)[..., rows, :].clone()

    kv_before, logits = stored(), outlook.logits[0, :, 0]
    following = logits[path[-1]].argmax()
    decoding.keep(path[None], following[None, None])
    known = torch.cat([torch.zeros(1, text, dtype=torch.long), decoding.tokens[:, :int(decoding.known)]], dim=1)
    return {"prefill_hidden_last": prefill.features[:, 0, -case.outputs["prefill_hidden_last"].shape[1]:],
            "first_logits": prefill.logits[:, 0, 0], "prefix_hidden": before.features[:, 0],
            "node_logits": logits[paths], "node_hidden": outlook.features[:, 0],
            "kv_before": kv_before, "kv_after": stored(),
            "current_length": decoding.length.expand(len(case.outputs["current_length"])), "ids_after": known[:, :-1],
            "drafter_hidden": outlook.features[:, 0, path], "drafter_ids": known.expand(2, -1)}


@dataclass
class Replayed:
    """Draws that are consumed in the order of the official calls."""

    gumbels: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def gumbel(self, name: str, size: tuple[int, ...], *, at: Tensor) -> Tensor:
        value = self.gumbels.pop(0)
        assert tuple(value.shape) == size
        return value[None, None]

    def uniform(self, name: str, size: tuple[int, ...], *, at: Tensor) -> Tensor:
        return self.tokens.pop(0)[None, None] if name == "token" else torch.zeros(1, 1, *size)


class Official(Speculation):
    """The loop with uniforms of acceptance that are consumed one per test, in the order of the tests."""

    accept: list[Tensor]
    kept: list[Tensor]

    def judge(self, proposal: Proposal, logits: Tensor, p: Tensor) -> Verdict:
        if self.processing.greedy:
            return super().judge(proposal, logits, p)
        uniforms, given = torch.full(proposal.tokens.shape, 0.5), set()
        while True:
            verdict = verify_tree(p[:, :, 0], proposal, uniforms[..., 0], self.policy)
            asked = (~verdict.odds[0].isnan() | verdict.skipped[0]).nonzero()[:, 0].tolist()
            waiting = [node for node in asked if node not in given]  # nodes are in the order of the tests
            if not waiting:
                return verdict
            uniforms[0, waiting[0], 0] = self.accept.pop(0)
            given.add(waiting[0])

    def draw(self, following: Tensor, cells: Tensor) -> Tensor:
        self.kept.append((following[0, 0] > 0).sum())
        return following.argmax(dim=-1) if self.processing.greedy else super().draw(following, cells)


def run(case: Case) -> dict[str, Any]:
    target, drafter = build(case)
    inputs, config, settings = case.inputs, case.config, case.config["generate"]
    static = settings["static_tree"]
    shape = (StaticTree(paths=config["tree"]) if static else
             DynamicTree(top_k=config["top_k_draft"], depth=config["depth"], total=config["total_tokens"]))
    policy = policy_of(settings["lantern"], settings["lantern_k"], settings["lantern_delta"],
                       "static" if static else "dynamic", inputs["codebook"])
    processing = processing_of(settings["temperature"], settings["top_k"], settings["top_p"])
    sampler = Speculative(draft=ModelDraft(model=Eagle(drafter=drafter), shape=shape), policy=policy,
                          guidance=Constant(settings["cfg"]), draw=processing.options)
    sampler.check(target)
    gumbels = [inputs[f"gumbel_{index}"] for index in range(sum(name.startswith("gumbel_") for name in inputs))]
    draws = Replayed(gumbels=gumbels, tokens=list(inputs.get("u_sample", ())))
    Official.accept, Official.kept = list(inputs.get("u_accept", ())), []
    batch = Official(sampler, target, condition_of(case), draws)
    outputs: dict[str, list[Any]] = {"best": [], "accept_length": [], "round_start": [], "accept_probs": []}
    while int(batch.decoding.known) - 1 <= settings["max_length"]:
        outputs["round_start"].append(int(batch.decoding.known) - 1)
        proposal, verdict = batch.advance(torch.tensor([True]))
        parents = proposal.tree.parents[0].tolist()
        paths = leaf_paths(parents, ordered=static or not processing.greedy)
        accepted = int(verdict.accepted)
        path = verdict.path[0, :accepted + 1]
        outputs["best"].append(int((paths[:, :accepted + 1] == path).all(dim=1).int().argmax()) if accepted else 0)
        outputs["accept_length"].append(accepted)
        outputs["accept_probs"] += verdict.odds[0][~verdict.odds[0].isnan()].tolist()
    computed = {name: torch.tensor(values) for name, values in outputs.items()}
    computed["tokens"] = batch.decoding.cell(torch.arange(settings["max_length"])[None])[..., 0]
    computed["mean_accepted"] = (computed["accept_length"] + 1).double().mean()
    computed["sample_kept"] = torch.stack(batch.kept)
    if "base_greedy_tokens" in case.outputs:
        plain = Autoregressive(guidance=Constant(settings["cfg"]), draw={"temperature": 0.0})
        tokens = plain.sample(target, condition_of(case), Draws(0, (0,))).tokens
        computed["base_greedy_tokens"] = tokens[:, :settings["max_length"]]
    return computed


RUNS = [f"run_{shape}_{mode}" for shape in ("dynamic", "static")
        for mode in ("greedy", "greedy_lantern", "greedy_lanternpp", "sampled", "sampled_lantern", "sampled_lanternpp",
                     "sampled_topp")]
KINDS = {
    "lantern/accept_dynamic_rows": lambda case: accept_rows(case, "dynamic"),
    "lantern/accept_static_rows": lambda case: accept_rows(case, "static"),
    "lantern/accept_greedy": accept_greedy,
    "lantern/knn_table": lambda case: {"table": neighbour_table(case.inputs["codebook"])},
    **{f"lantern/static_tree_{name}": static_tree for name in "abcdefgh"},
    **{f"lantern/draft_dynamic_{mode}": draft_dynamic for mode in ("greedy", "sampled")},
    **{f"lantern/draft_static_{mode}": draft_static for mode in ("greedy", "sampled")},
    "lantern/drafter_forward": drafter_forward,
    "lantern/drafter_loss": drafter_loss,
    "lantern/tree_verify": tree_verify,
    **{f"lantern/{name}": run for name in RUNS},
}
