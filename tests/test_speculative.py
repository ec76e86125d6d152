"""Speculative sampling: exact where it says so, bounded where it is relaxed, the same in every batch."""

from __future__ import annotations

import copy
import heapq
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.learning import losses_while_learning
from tests.speculation import (
    DRAFTS,
    SMALL_TREE,
    causal,
    condition_of,
    draft,
    drafter,
    histogram,
    joint,
    llamagen,
    p_value,
    sampler,
    shaken,
)
from varzoo.cli import sample as cli
from varzoo.core.checkpoint import read_config, save_weights, weights_hash
from varzoo.core.draws import Draws
from varzoo.core.steps import Constant, LinearInSteps
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import CausalGenerator, Prefix
from varzoo.generators.ragged import Outlook, Ragged, RaggedDecoding
from varzoo.generators.trees import Tree
from varzoo.loading import build, compose_config, equip, load, load_generator
from varzoo.samplers import Autoregressive
from varzoo.samplers.speculative import (
    Additive,
    DynamicTree,
    DySpecTree,
    Eagle,
    Exact,
    Grouped,
    Jacobi,
    KSequential,
    Lantern,
    ModelDraft,
    Multiplicative,
    Sequences,
    Smaller,
    Speculative,
    StaticTree,
)
from varzoo.samplers.speculative.models import DraftState
from varzoo.samplers.speculative.neighbours import cached_table, neighbour_table
from varzoo.samplers.speculative.policies import Policy, Siblings
from varzoo.samplers.speculative.proposals import POINT, WITH, WITHOUT, Proposal, Verdict
from varzoo.samplers.speculative.shapes import TREES, Processing
from varzoo.samplers.speculative.verify import verify, verify_chain, verify_tree
from varzoo.training.run import train

RUNS = 100_000


# The joint distribution over whole sequences, by a chi-square test at fixed seeds.

@pytest.mark.parametrize(("drafts", "policy", "scale"), [
    ("eagle_static", Exact(), 1.5), ("eagle_dynamic", Exact(), 1.5), ("eagle_dyspec", Exact(), 1.5),
    ("eagle_chain", Exact(), 1.0),
    ("smaller_iid", Exact(), 1.0), ("smaller_iid", KSequential(), 1.0), ("jacobi", Exact(), 1.5)])
def test_lossless_policies_draw_what_the_target_says(drafts: str, policy: Policy, scale: float) -> None:
    model = llamagen((1, 3), std=0.3)
    exact = sampler(draft(drafts, model), policy, scale=scale)
    assert p_value(histogram(exact, model, RUNS), joint(model, 1, scale)) > 1e-3
    counts = exact.sample(model, Condition.classes(torch.ones(2000, dtype=torch.long)), Draws(1, range(2000))).counts
    assert 0.05 < counts.acceptance_rate < 0.95  # the drafts were neither all right nor all wrong


@pytest.mark.parametrize("kind", ["token_shuffle", "elm"])
def test_cells_of_several_ids_are_drawn_as_the_target_says(kind: str) -> None:
    """Windows of four ids and groups of two: 256 and 16 sequences of two cells."""
    model = causal(kind, seed=3)
    shape, size = {"token_shuffle": ((2, 4), 2), "elm": ((1, 2), 2)}[kind]
    model = causal(kind, seed=3, shape=shape, size=size)
    smaller = causal(kind, seed=4, shape=shape, size=size)
    for drafts in (Jacobi(window=2, fill="random"),
                   ModelDraft(model=Smaller(generator=smaller), shape=Sequences(length=1))):
        counts, batch = torch.zeros(2 ** model.spec.length if kind == "token_shuffle" else 16), 25_000
        weights = 2 ** torch.arange(len(counts).bit_length() - 1).flip(0)
        for start in range(0, 50_000, batch):
            tokens = sampler(drafts).sample(model, Condition.classes(torch.ones(batch, dtype=torch.long)),
                                            Draws(0, range(start, start + batch))).tokens.flatten(1)
            counts += (tokens * weights).sum(dim=1).bincount(minlength=len(counts))
        assert p_value(counts, joint(model, 1, 1.5)) > 1e-3


def test_the_chi_square_test_notices_a_relaxed_policy() -> None:
    model = llamagen((1, 3), std=0.3)
    policy = Lantern(bound=Additive(delta=0.3), k=2, rule="static")
    policy.use_table(neighbour_table(torch.tensor([[0.0], [1.0], [3.0]])))
    assert p_value(histogram(sampler(draft("eagle_static", model), policy), model, 25_000), joint(model, 1, 1.5)) < 1e-6


def test_temperature_and_filters_apply_to_target_and_draft() -> None:
    model, options = llamagen((1, 3), 4, std=0.4), {"temperature": 1.3, "top_k": 3, "top_p": 0.9}
    filtered = sampler(draft("eagle_static", model), **options)
    probabilities = joint(model, 1, 1.5, **options)
    counts = histogram(filtered, model, 25_000)
    assert (counts[probabilities == 0] == 0).all() and (probabilities == 0).any()
    assert p_value(counts[probabilities > 0], probabilities[probabilities > 0]) > 1e-3


# Greedy decoding, and batches.

@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_greedy_speculation_is_plain_greedy_decoding(drafts: str, text: bool) -> None:
    model = llamagen((3, 4), 9, text=text, depth=2)
    condition, draws = condition_of(model, 5), Draws(0, range(5))
    guidance = LinearInSteps(3.0) if text else Constant(2)
    plain = Autoregressive(guidance=guidance, draw={"temperature": 0.0}).sample(model, condition, draws).tokens
    assert len(plain.unique(dim=0)) > 2
    greedy = sampler(draft(drafts, model), guidance=guidance, temperature=0.0)
    for rows in ([0, 1, 2, 3, 4], [3], [1, 2]):
        assert torch.equal(greedy.sample(model, rows_of(condition, rows), draws.rows(rows)).tokens, plain[rows])


@pytest.mark.parametrize("kind", ["dar", "flextok", "elm", "token_shuffle"])
def test_every_target_is_decoded_greedily_as_it_is_plainly(kind: str) -> None:
    model, smaller = causal(kind), causal(kind, seed=2)
    condition, draws, guidance = condition_of(model, 4), Draws(0, range(4)), Constant(2.0)
    plain = Autoregressive(guidance=guidance, draw={"temperature": 0.0}).sample(model, condition, draws).tokens
    kinds = [Jacobi(window=4, fill="repeat"), ModelDraft(model=Smaller(generator=smaller), shape=Sequences(length=3))]
    if "features" in model.offers:
        kinds.append(draft("eagle_dynamic", model))
    for drafts in kinds:
        sampled = sampler(drafts, guidance=guidance, temperature=0.0).sample(model, condition, draws)
        assert torch.equal(sampled.tokens, plain)
        assert sampled.counts.verifications < 4 * len(model.order.cells) or sampled.counts.accepted == 0


def rows_of(condition: Condition, rows: list[int]) -> Condition:
    take = lambda tensor: None if tensor is None else tensor[rows]  # noqa: E731
    return Condition(size=len(rows), labels=take(condition.labels), features=take(condition.features),
                     mask=take(condition.mask))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_an_image_is_the_same_in_every_batch(drafts: str, text: bool) -> None:
    model = llamagen((2, 4), 9, text=text)
    condition, draws, exact = condition_of(model, 5), Draws(3, range(5)), sampler(draft(drafts, model))
    together = exact.sample(model, condition, draws).tokens
    assert len(together.unique(dim=0)) > 2
    for rows in ([2], [4, 0, 3]):  # alone, and permuted
        assert torch.equal(exact.sample(model, rows_of(condition, rows), draws.rows(rows)).tokens, together[rows])


def test_lantern_in_a_batch_of_two_equals_two_singles() -> None:
    model = llamagen((3, 4), 9)
    for shape, rule in ((DynamicTree(top_k=3, depth=2, total=9), "dynamic"), (StaticTree(paths=SMALL_TREE), "static")):
        policy = Lantern(bound=Additive(delta=0.2), k=4, rule=rule)
        policy.use_table(neighbour_table(torch.randn(9, 3, generator=torch.Generator().manual_seed(0))))
        relaxed = sampler(ModelDraft(model=Eagle(drafter=drafter(model)), shape=shape), policy, top_k=7)
        both = relaxed.sample(model, condition_of(model, 2), Draws(5, range(2)))
        for row in range(2):
            alone = relaxed.sample(model, rows_of(condition_of(model, 2), [row]), Draws(5, (row,))).tokens
            assert torch.equal(alone[0], both.tokens[row])
        assert both.counts.accepted > 0


def test_two_batches_at_once() -> None:
    model = llamagen((2, 4), 9)
    exact, draws = sampler(draft("eagle_dynamic", model)), [Draws(0, range(3)), Draws(1, range(3))]
    alone = [exact.sample(model, condition_of(model, 3), each).tokens for each in draws]
    with torch.no_grad():
        batches = [exact.open(model, condition_of(model, 3), each) for each in draws]
        while not all(batch.done for batch in batches):
            for batch in batches:
                batch.advance(batch.decoding.known < batch.decoding.cells)
    assert all(torch.equal(batch.decoding.tokens, tokens) for batch, tokens in zip(batches, alone))


def test_a_prefix_of_the_tokens_and_the_steps_that_are_told() -> None:
    model = causal("dar")
    seen: list[tuple[int, int, int]] = []
    short = Speculative(draft=Jacobi(window=3, fill="random"), policy=Exact(), plan=Prefix(4))
    sampled = short.sample(model, condition_of(model, 3), Draws(0, range(3)), lambda progress: seen.append(
        (progress.step.drawn, progress.step.positions.shape[1], progress.step.left)))
    assert sampled.tokens.shape == (3, 4)
    ends = [drawn + count for drawn, count, _ in seen]
    assert [drawn for drawn, _, _ in seen] == [0, *ends[:-1]] and ends[-1] == 4  # every token is told once, in order
    assert all(left == 6 - end for (_, _, left), end in zip(seen, ends))
    with pytest.raises(ValueError, match="no prefix of"):
        Speculative(draft=Jacobi(window=3, fill="random"), policy=Exact(), plan=Prefix(2)).sample(
            llamagen(), condition_of(llamagen(), 1), Draws(0, (0,)))


def test_counts() -> None:
    """A target that drafts for itself is always right: every round keeps its whole sequence and one cell more."""
    model = llamagen((3, 4), 9)
    itself = ModelDraft(model=Smaller(generator=model), shape=Sequences(length=3))
    counts = sampler(itself).sample(model, condition_of(model, 2), Draws(0, range(2))).counts
    assert counts.acceptance_rate == 1 and counts.mean_accepted_length == 4
    assert (counts.steps, counts.backbone_evaluations, counts.verifications) == (1 + 3, 1 + 3, 6)
    assert counts.draft_evaluations == 1 + 3 * 3 and counts.seconds > 0
    plain = Autoregressive().sample(model, condition_of(model, 2), Draws(0, range(2))).counts
    assert plain.draft_evaluations == 0 and plain.acceptance_rate != plain.acceptance_rate


# The target's decoding.

@pytest.mark.parametrize("text", [False, True])
def test_compaction_after_a_partly_kept_tree_equals_a_fresh_prefill(text: bool) -> None:
    """Samples keep paths of different lengths; keys, values and what follows are then those of a fresh decoding."""
    model, plan = llamagen((3, 4), 9, text=text, depth=2), Ragged(nodes=8, levels=4)
    condition, generator = condition_of(model, 3), torch.Generator().manual_seed(0)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3]])
    draw = lambda *shape: torch.randint(9, (*shape, 1), generator=generator)  # noqa: E731
    decoding = opened(model, condition, plan)
    decoding.admit(draw(3))
    for path in ([[0, 1, 3], [0, 2, -1], [0, -1, -1]], [[0, 2, 5], [0, 1, 4], [-1, -1, -1]]):
        ids = torch.cat([decoding.pending[:, None], draw(3, 6)], dim=1)
        decoding.verify(ids, Tree(parents, 3))
        decoding.keep(torch.tensor(path), draw(3))
    assert decoding.known.tolist() == [7, 6, 2]
    outlook = decoding.verify(decoding.pending[:, None], Tree.chain(1))
    for row in range(3):
        known = int(decoding.known[row])
        fresh = opened(model, rows_of(condition, [row]), Ragged(nodes=12, levels=12))
        fresh.admit(decoding.cell(torch.zeros(3, dtype=torch.long))[row:row + 1])
        expected = fresh.verify(decoding.tokens[row:row + 1, :known, None], Tree.chain(known))
        torch.testing.assert_close(outlook.logits[row, -1], expected.logits[0, -1], atol=1e-5, rtol=1e-4)
        length = int(decoding.length[row])
        for mine, theirs in ((decoding._cache.keys, fresh._cache.keys), (decoding._cache.values, fresh._cache.values)):
            torch.testing.assert_close(mine[:, row::3, :, :length], theirs[:, :, :, :length], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def opened(model: CausalGenerator, condition: Condition, plan: Ragged) -> RaggedDecoding:
    decoding = model.begin(condition, draws=Draws(0, range(condition.size)), guidance=LinearInSteps(2.5), plan=plan)
    decoding.prefill()
    return decoding


def test_verifying_changes_nothing_and_may_go_on_where_it_was() -> None:
    model = llamagen((3, 4), 9)
    decoding = opened(model, condition_of(model, 2), Ragged(nodes=8, levels=4))
    decoding.admit(torch.tensor([[3], [4]]))
    tree = Tree(torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 2, 0]]), 3)
    ids = torch.randint(9, (2, 5, 1), generator=torch.Generator().manual_seed(1))
    whole = decoding.verify(ids, tree)
    torch.testing.assert_close(decoding.verify(ids, tree).logits, whole.logits, atol=0, rtol=0)
    assert decoding.tokens[:, 1:].sum() == 0 and decoding.known.tolist() == [1, 1]
    decoding.verify(ids[:, :3], tree.first(3))
    torch.testing.assert_close(decoding.verify(ids, tree, start=3).logits, whole.logits[:, 3:], atol=1e-5, rtol=1e-4)


def test_nodes_see_their_own_line_and_are_guided_by_their_depth() -> None:
    """Each node's logits are those of teacher forcing along its line, at the scale of its own step."""
    model, schedule = llamagen((2, 3), 9, depth=2), LinearInSteps(3.0)
    condition = condition_of(model, 1)
    decoding = model.begin(condition, draws=Draws(0, (0,)), guidance=schedule, plan=Ragged(nodes=8, levels=4))
    decoding.prefill()
    decoding.admit(torch.tensor([[3]]))
    ids, parents = torch.tensor([3, 5, 6, 7, 8]), [-1, 0, 0, 2, 3]
    logits = decoding.verify(ids[None, :, None], Tree(torch.tensor([parents]), 3)).logits[0, :, 0]
    for node in range(5):
        line = [node]
        while line[0]:
            line.insert(0, parents[line[0]])
        known = ids[line][None]
        conditional, null = model(known, condition)[0, -1], model(known, model.conditioner.null(condition))[0, -1]
        scale = schedule(decoding.planned[len(line)])
        torch.testing.assert_close(logits[node], null + scale * (conditional - null), atol=1e-5, rtol=1e-4)


def test_rewinding_forgets_cells() -> None:
    model = llamagen((3, 4), 9)
    decoding = opened(model, condition_of(model, 2), Ragged(nodes=8, levels=4))
    decoding.admit(torch.tensor([[3], [4]]))
    first = decoding.verify(decoding.pending[:, None], Tree.chain(1)).logits
    decoding.verify(torch.tensor([[[3], [1], [2]], [[4], [5], [6]]]), Tree.chain(3))
    decoding.keep(torch.tensor([[0, 1, 2], [0, 1, -1]]), torch.tensor([[7], [8]]))
    decoding.rewind(torch.tensor([3, 2]))
    assert decoding.known.tolist() == [1, 1] and decoding.pending.tolist() == [[3], [4]]
    torch.testing.assert_close(decoding.verify(decoding.pending[:, None], Tree.chain(1)).logits, first)
    with pytest.raises(ValueError, match="one stays"):
        decoding.rewind(torch.tensor([1, 0]))


@pytest.mark.parametrize("kind", ["llamagen", "dar", "flextok", "elm", "token_shuffle"])
def test_the_plain_loop_over_a_ragged_decoding_is_the_plain_decoding(kind: str) -> None:
    model = causal(kind)
    sample = lambda plan: Autoregressive(guidance=Constant(2.0), plan=plan).sample(  # noqa: E731
        model, condition_of(model, 3), Draws(0, range(3))).tokens
    assert torch.equal(sample(Ragged(nodes=1, levels=0)), sample(None))


# Rules.

def law(policy: Policy, p: Tensor, tokens: list[int], kind: str, q: Tensor | None = None) -> Tensor:
    """The distribution of the token after a place whose candidates are given, by the odds of every outcome."""
    siblings = policy.enter(Siblings(p[None], None if q is None else q[None], kind, torch.tensor([len(tokens)])))
    result, left = torch.zeros_like(p), 1.0
    for token in tokens:
        x = torch.tensor([token])
        chance = float(policy.odds(siblings, x).clamp(0, 1))
        result[token] += left * chance
        left *= 1 - chance
        siblings = policy.reject(siblings, x, torch.tensor([True]))
    return result + left * policy.rest(siblings)[0]


def distributions(size: int, count: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [tuple((1.5 * torch.randn(2, size, generator=generator)).double().softmax(-1)) for _ in range(count)]


def test_one_step_marginals_of_exact_policies_by_enumeration() -> None:
    for p, q in distributions(4):
        torch.testing.assert_close(law(Exact(), p, [2, 0], POINT), p)
        pairs = [(one, two) for one in range(4) for two in range(4)]
        with_ = sum(q[one] * q[two] * law(Exact(), p, [one, two], WITH, q) for one, two in pairs)
        torch.testing.assert_close(with_, p)
        without = sum(q[one] * q[two] / (1 - q[one]) * law(Exact(), p, [one, two], WITHOUT, q)
                      for one, two in pairs if one != two)
        torch.testing.assert_close(without, p)
        policy = KSequential()
        torch.testing.assert_close(
            sum(q[one] * q[two] * law(policy, p, [one, two], WITH, q) for one, two in pairs), p, atol=1e-6, rtol=1e-5)
        rho = policy.enter(Siblings(p[None], q[None], WITH, torch.tensor([2]))).rho
        assert 1 <= rho <= 2
        alone = policy.enter(Siblings(p[None], q[None], WITH, torch.tensor([1]))).rho
        assert alone == 1  # K = 1 is plain speculative sampling


def lantern(rule: str, bound: Additive | Multiplicative, k: int = 4) -> Lantern:
    policy = Lantern(bound=bound, k=k, rule=rule)
    policy.use_table(neighbour_table(torch.randn(12, 3, generator=torch.Generator().manual_seed(4))))
    return policy


def test_relaxed_policies_stay_within_their_bounds() -> None:
    for p, _ in distributions(12, 10):
        for delta in (0.0, 0.05, 0.2, 0.6):
            policy = lantern("paper", Additive(delta=delta))
            for token in range(12):
                x = torch.tensor([token])
                raised, _ = policy.raised(p[None], x)
                assert 0 <= float(raised) - p[token] <= delta + 1e-9  # what a test adds
                moved = law(policy, p, [token], POINT)
                assert (moved - p).abs().sum() / 2 <= delta + 1e-9
            for tokens in ([3, 5], [1, 8, 2]):
                assert (law(policy, p, tokens, POINT) - p).abs().sum() / 2 <= delta * len(tokens) + 1e-9
            official = lantern("dynamic", Additive(delta=delta))
            for token in range(12):  # the official rule drops the k + 1 nearest once any was counted
                near = p[official.table[token, :5]].sum()
                counted = bool(official.raised(p[None], torch.tensor([token]))[1])
                moved = (law(official, p, [token], POINT) - p).abs().sum() / 2
                assert moved <= (near if counted else 0) + 1e-9
        factor = lantern("paper", Multiplicative(factor=3.0))
        for token in range(12):
            raised, _ = factor.raised(p[None], torch.tensor([token]))
            assert p[token] <= float(raised) <= 3 * p[token] + 1e-9
            assert (law(factor, p, [token], POINT) - p).abs().sum() / 2 <= 2 * p[token] + 1e-9


def test_measured_total_variation_of_lantern_on_whole_runs() -> None:
    """The first drafted token of every run, 20,000 of them, against the target's own: within delta per candidate."""
    model, delta = llamagen((1, 2), 6, std=0.6), 0.1
    policy = Lantern(bound=Additive(delta=delta), k=3, rule="paper")
    policy.use_table(neighbour_table(torch.randn(6, 2, generator=torch.Generator().manual_seed(1))))
    relaxed = sampler(ModelDraft(model=Eagle(drafter=drafter(model)), shape=DynamicTree(top_k=2, depth=0, total=3)),
                      policy)
    counts, exact = histogram(relaxed, model, 50_000), joint(model, 1, 1.5)
    measured = (counts / counts.sum() - exact).abs().sum() / 2
    assert 0.01 < measured <= 2 * delta + 0.01


def test_a_chain_is_a_tree_of_one_line() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(64, 4, 1, 6, generator=generator).softmax(-1) for _ in range(2))
    tokens = torch.randint(6, (64, 4, 1), generator=generator)
    proposal = Proposal(tokens=tokens, tree=Tree.chain(4), kind=WITH, q=q, group=torch.arange(4)[None])
    uniforms = torch.rand(64, 4, 1, generator=generator)
    chain = verify_chain(p, proposal, uniforms, Exact())
    tree = verify_tree(p[:, :, 0], proposal, uniforms[:, :, 0], Exact())
    assert torch.equal(chain.path, tree.path) and len(chain.accepted.unique()) > 2
    torch.testing.assert_close(chain.following, tree.following)
    torch.testing.assert_close(chain.odds, tree.odds, equal_nan=True)


def test_ids_of_a_cell_that_are_kept_are_settled() -> None:
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).expand(2, -1, -1)[None]
    q = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).expand(2, -1, -1)[None]
    proposal = Proposal(tokens=torch.zeros(1, 2, 2, dtype=torch.long), tree=Tree.chain(2), kind=WITH, q=q,
                        group=torch.arange(2)[None])
    verdict = verify(p, proposal, torch.full((1, 2, 2), 0.7), Exact())
    assert verdict.accepted.tolist() == [0]
    torch.testing.assert_close(verdict.following[0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_a_candidate_without_probability_is_never_kept() -> None:
    p = torch.tensor([0.0, 0.25, 0.75])[None, None, None].expand(1, 2, 1, 3)
    proposal = Proposal(tokens=torch.zeros(1, 2, 1, dtype=torch.long), tree=Tree.chain(2), kind=POINT)
    assert verify(p, proposal, torch.zeros(1, 2, 1), Exact()).accepted.tolist() == [0]


def test_trees_by_gathers() -> None:
    tree = StaticTree(paths="naive_extend_57").on(torch.device("cpu")).tree
    parents = tree.parents[0].tolist()
    for node in range(tree.nodes):
        line, above = [node], node
        while above:
            above = parents[above]
            line.append(above)
        assert tree.lineage[0, node].nonzero()[:, 0].tolist() == sorted(line)
        assert tree.depth[0, node] == len(line) - 1
        children = [child for child in range(1, tree.nodes) if parents[child] == node]
        assert [child for child in tree.children()[0, node].tolist() if child >= 0] == children
    twins = Tree(torch.tensor([[-1, 0, 0, 1, 2]]), 2)  # 1 and 2 hold the same token, 3 and 4 follow them
    assert twins.children(torch.tensor([[9, 5, 5, 1, 2]]))[0, 1].tolist() == [3, 4]
    assert [len(TREES[name]) for name in ("mc_sim_7b_63", "naive_extend_57", "chain")] == [25, 57, 5]


class Tabled(DraftState):
    """A draft whose distribution depends on the level and the token before."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.level = logits, 0

    def root(self) -> Tensor:
        return self.logits[:, 0, :1, None]

    def grow(self, tokens: Tensor, tree: Tree) -> Tensor:
        self.level += 1
        return self.logits[:, self.level].gather(1, tokens.expand(-1, -1, self.logits.shape[-1]))[:, :, None]

    def follow(self, proposal: Proposal, verdict: Verdict, outlook: Outlook) -> None:
        pytest.fail("one tree is grown, and nothing is kept of it")


def heap_tree(logits: Tensor, gumbel: list[Tensor], total: int) -> set[tuple[int, ...]]:
    """DySpec's heap for one sample, node by node: the paths it grows, given all that drafting by levels may draw."""
    width = logits.shape[-1]
    value, children = {(): 1.0}, {}
    followed: list[tuple[int, ...]] = [()]
    for level, noise in enumerate(gumbel):
        for rank, path in enumerate(followed):
            row = logits[level, path[-1] if path else 0].softmax(-1)
            children[path] = [(*path, token) for token in (row.log() + noise[rank]).argsort(descending=True).tolist()]
            value.update({child: value[path] * float(row[child[-1]]) for child in children[path]})
        drawn = [child for path in followed for child in children[path]]
        followed = sorted(drawn, key=lambda child: -value[child])[:width]
    heap, paths = [(-1.0, 0, ())], set()
    while len(paths) < total - 1:
        left, index, parent = heapq.heappop(heap)
        child = children[parent][index]
        paths.add(child)
        if index + 1 < width:
            heapq.heappush(heap, (left + value[child], index + 1, parent))
        if child in children:
            heapq.heappush(heap, (-value[child], 0, child))
    return paths


@pytest.mark.parametrize("total", [2, 4, 6])
def test_dyspec_grows_what_its_heap_would(total: int) -> None:
    torch.manual_seed(total)
    logits, draws, first = 2 * torch.randn(5, 3, 4, 4), Draws(0, range(5)), torch.arange(5)
    proposal = DySpecTree(top_k=4, depth=2, total=total).grow(
        Tabled(logits), torch.zeros(5, 1, dtype=torch.long), first, Processing(), draws)
    for sample in range(5):
        own = Draws(0, [sample])
        gumbel = [own.gumbel("draft", (1 if level == 0 else 4, 4), at=first[sample:sample + 1, None] + level)[0, 0]
                  for level in range(3)]
        parents, tokens = proposal.tree.parents[sample].tolist(), proposal.tokens[sample, :, 0].tolist()
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, total):
            paths.append((*paths[parents[node]], tokens[node]))
        assert set(paths[1:]) == heap_tree(logits[sample], gumbel, total)
        for node in range(1, total):  # and each knows what it was drawn from
            level = len(paths[node]) - 1
            expected = logits[sample, level, tokens[parents[node]] if level else 0].softmax(-1)
            torch.testing.assert_close(
                proposal.draft_of(torch.tensor(parents[node]).expand(5, 1))[sample, 0, 0], expected)


def test_neighbours_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    table = cached_table(codebook, 9, tmp_path)
    distances = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    assert torch.equal(table, distances.argsort(dim=1, stable=True)[:, :9])
    assert torch.equal(table, neighbour_table(codebook)[:, :9])
    monkeypatch.setattr("varzoo.samplers.speculative.neighbours.neighbour_table", None)  # not called again
    assert torch.equal(cached_table(codebook, 9, tmp_path), table)
    with pytest.raises(TypeError):
        cached_table(codebook + 1e-3, 9, tmp_path)  # another codebook is another table
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="is damaged"):
        cached_table(codebook, 9, tmp_path)


# The drafter.

def test_the_drafter_learns_its_target() -> None:
    target = llamagen((2, 3), 9, depth=2)
    model = drafter(target, std=0.1).train()
    model.use_target(target)
    assert torch.equal(model.embedding.weight, target.embedding.weight)
    batch = Batch(tokens=torch.arange(6).repeat(6, 1), condition=Condition.classes(torch.arange(6) % 3))
    losses = losses_while_learning(model, batch, steps=60, lr=1e-2)
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(model.embedding.weight, target.embedding.weight)  # frozen
    assert copy.deepcopy(model).target is target  # copies of a drafter share it
    assert all(parameter.grad is None for parameter in target.parameters())
    with torch.no_grad():
        one = model.loss(batch, Draws(0, range(6)), 0.0)
        half = Batch(tokens=batch.tokens, condition=batch.condition, weights=torch.tensor([0.0] * 3 + [1.0] * 3))
        other = model.loss(half, Draws(0, range(6)), 0.0)
    assert float(one.total) == pytest.approx(float(one.parts["feature"] + 0.1 * one.parts["logits"]))
    assert float(other.total) != pytest.approx(float(one.total))


def test_layouts_are_bijective() -> None:
    for model, layout in ((llamagen(text=True), "lantern"), (llamagen(), "lantern"), (drafter(llamagen()), "eagle")):
        key_map, state = model.key_maps()[layout], model.state_dict()
        official = key_map.to_official(state)
        back = key_map.to_ours(official)
        assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert "layers.0.input_layernorm.weight" not in official
    assert {"fc.bias", "layers.0.self_attn.q_proj.weight"} < set(official)
    shuffled = causal("token_shuffle")
    key_map = shuffled.key_maps()["lantern"]
    assert set(key_map.to_ours(key_map.to_official(shuffled.state_dict()))) == set(shuffled.state_dict())


# From configs and files; bad input.

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained files of a run of digits_llamagen, and of its drafter."""
    folder = tmp_path_factory.mktemp("runs")
    vq = compose_config("train", ["experiment=smoke_vq"]).tokenizer
    small = ["generator.width=32", "generator.heads=2"]
    config = compose_config("train", ["experiment=smoke_llamagen", "generator.depth=1", *small])
    plain = {"class_names": [str(digit) for digit in range(10)], "sampler": as_node(config.sampler)}
    for name, key, node in (("run/tokenizer", "tokenizer", vq), ("run/generator", "generator", config.generator),
                            ("drafter/generator", "generator", compose_config(
                                "train", ["experiment=smoke_drafter", "generator.hidden=64", *small]).generator)):
        torch.manual_seed(0)
        save_weights(folder / f"{name}.safetensors", shaken(build(node), 0, 0.2).state_dict(),
                     {key: as_node(node), **plain})
    return folder


def as_node(config: object) -> object:
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("name", ["lantern", "lantern_pp", "eagle", "eagle2", "speculative", "spectr", "sjd", "gsd"])
def test_every_sampler_config_draws(name: str, folder: Path, tmp_path: Path) -> None:
    by = folder / ("drafter" if name in ("lantern", "lantern_pp", "eagle", "eagle2") else "run")
    more = {"lantern": ["sampler.policy.k=50"]}.get(name, [])
    neighbours = [f"sampler.neighbours={tmp_path}"]
    model = load(folder / "run", overrides=[f"sampler={name}", f"drafter={by}", *neighbours, *more])
    images, counts = model.sample([3, 7], seed=1)
    assert images.shape == (2, 3, 16, 16) and counts.verifications > 0
    assert len(list(tmp_path.iterdir())) == (name in ("lantern", "lantern_pp"))
    assert len(model.sampler.networks) == (name not in ("sjd", "gsd"))


def test_the_cli_takes_a_run_and_a_drafter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sample.py", f"checkpoint={folder / 'run'}", "sampler=eagle2", "labels=[3]",
                                     f"drafter={folder / 'drafter'}", "per_class=1", f"out={tmp_path / 'grid.png'}"])
    cli.main()
    assert (tmp_path / "grid.png").is_file()


def test_a_drafter_is_trained_on_a_run_and_drafts_for_it(folder: Path, tmp_path: Path) -> None:
    settings = ["experiment=smoke_drafter", f"run_dir={tmp_path / 'drafter'}", f"target_checkpoint={folder / 'run'}",
                f"tokenizer_checkpoint={folder / 'run'}", "steps=3", "validate_every=3", "checkpoint_every=3",
                "generator.width=32", "generator.heads=2", "generator.hidden=64"]
    trained = train(compose_config("train", settings))
    images, counts = load(folder / "run", overrides=["sampler=eagle", f"drafter={trained}"]).sample([3], seed=1)
    assert images.shape == (1, 3, 16, 16) and counts.draft_evaluations > 0
    weights = load_generator(trained)
    target = load_generator(folder / "run")
    assert torch.equal(weights.embedding.weight, target.embedding.weight)  # of the target, and not trained
    assert read_config(trained / "generator.safetensors")["target_hash"] == weights_hash(target.state_dict())
    with pytest.raises(FileNotFoundError, match="give target_checkpoint=RUN"):
        train(compose_config("train", [*settings, "target_checkpoint=null", f"run_dir={tmp_path / 'other'}"]))
    with pytest.raises(ValueError, match=r"predicts features of width 64, the target's have width 32"):
        train(compose_config("train", [*settings, "generator.width=64", f"run_dir={tmp_path / 'third'}"]))


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    model = llamagen((2, 2), 5)
    with pytest.raises(ValueError, match=r"drafter was made for .* of 6 codes, the target models .* of 5 codes"):
        sampler(ModelDraft(model=Eagle(drafter=drafter(llamagen((2, 2), 6))), shape=Sequences(length=1))).check(model)
    with pytest.raises(ValueError, match=r"the draft generator models .* same tokenizer"):
        sampler(ModelDraft(model=Smaller(generator=llamagen((2, 2), 6)), shape=Sequences(length=1))).check(model)
    with pytest.raises(ValueError, match=r"k=5 nearest codes were asked for, but a codebook of 5 codes has only 4"):
        Lantern(bound=Additive(delta=0.1), k=5, rule="dynamic").use_table(torch.zeros(5, 4, dtype=torch.long))
    relaxed = sampler(draft("eagle_dynamic", model), Lantern(bound=Additive(delta=0.1), k=7, rule="dynamic"))
    with pytest.raises(ValueError, match=r"a codebook of 5 codes has 1 to 4 neighbours of each, not 7: lower k"):
        relaxed.use_codebook(torch.randn(5, 2))
    with pytest.raises(ValueError, match="has no codebook yet"):
        relaxed.sample(model, condition_of(model, 1), Draws(0, (0,)))
    with pytest.raises(ValueError, match=r"delta is in \[0, 1\], got -0\.1"):
        Additive(delta=-0.1)
    with pytest.raises(ValueError, match="factor above 1, got 1"):
        Multiplicative(factor=1.0)
    with pytest.raises(ValueError, match=r"unknown rule of rejection 'dynamik'\. Did you mean 'dynamic'"):
        Lantern(bound=Additive(delta=0.1), k=2, rule="dynamik")
    with pytest.raises(ValueError, match="Lantern verifies drafts that are chosen, not drawn; those of this draft are"):
        sampler(draft("eagle_static", model), Lantern(bound=Additive(delta=0.1), k=2, rule="dynamic"))
    with pytest.raises(ValueError, match="KSequential verifies drafts that are drawn independently"):
        sampler(draft("eagle_dynamic", model), KSequential())
    with pytest.raises(ValueError, match="takes a number for temperature"):
        sampler(draft("eagle_dynamic", model), temperature=Constant(1.0))
    with pytest.raises(ValueError, match="'solver' does not fit"):
        sampler(draft("eagle_dynamic", model), solver="ddpm").check(model)
    jacobi = sampler(Jacobi(window=4, fill="repeat"))
    for name, reason in (("nar_tiny", "draws up to 8 cells at once.*that needs nothing, such as Autoregressive"),
                         ("mar_tiny", "predicts DiffusionPrediction of continuous grid.*such as Autoregressive"),
                         ("rq_tiny", "predicts DepthPrediction")):
        other = build(compose_config("sample", [f"generator={name}", "checkpoint=none"]).generator)
        with pytest.raises(ValueError, match=reason):
            jacobi.check(other)
    elm, shuffled = causal("elm"), causal("token_shuffle")
    with pytest.raises(ValueError, match=r"no hidden states.*sampler=speculative"):
        sampler(ModelDraft(model=Eagle(drafter=drafter(model)), shape=Sequences(length=1))).check(elm)
    with pytest.raises(ValueError, match="draws 4 ids at once"):
        sampler(ModelDraft(model=Smaller(generator=shuffled), shape=DynamicTree(top_k=2, depth=1, total=4))).check(
            shuffled)
    with pytest.raises(ValueError, match="compares codes, and a position of"):
        Speculative(draft=Jacobi(window=3, fill="random"), policy=Lantern(
            bound=Additive(delta=0.1), k=2, rule="static")).check(elm)
    with pytest.raises(ValueError, match="compares input embeddings"):
        Speculative(draft=Jacobi(window=3, fill="random"), policy=Grouped()).check(elm)
    with pytest.raises(ValueError, match=r"path \[1, 0\] of the static tree hangs in the air: add \[1\]"):
        StaticTree(paths=[[0], [1, 0]])
    with pytest.raises(ValueError, match=r"2 <= total <= 7 \(of 2 \+ 1 x 2\^2 scored nodes\), got total=9"):
        DynamicTree(top_k=2, depth=1, total=9)
    with pytest.raises(ValueError, match="DynamicTree chooses 9 different children of a node, but there are only 5"):
        sampler(ModelDraft(model=Eagle(drafter=drafter(model)), shape=DynamicTree(top_k=9, depth=1, total=4))).check(
            model)
    with pytest.raises(ValueError, match=r"draws nothing by itself.*sampler=lantern"):
        drafter(model).begin(condition_of(model, 1), draws=Draws(0, (0,)))
    with pytest.raises(ValueError, match=r"was given none.*target_checkpoint"):
        drafter(model).loss(Batch(tokens=torch.zeros(1, 4, dtype=torch.long), condition=condition_of(model, 1)),
                            Draws(0, (0,)), 0.0)
    with pytest.raises(ValueError, match="takes no target"):
        model.use_target(model)
    with pytest.raises(FileNotFoundError, match="give drafter=RUN"):
        load(folder / "run", overrides=["sampler=lantern"])
    shutil.copy(folder / "run" / "tokenizer.safetensors", folder / "drafter")
    with pytest.raises(ValueError, match="draws nothing by itself"):
        load(folder / "drafter").sample([1])
    with pytest.raises(ValueError, match="exceeds the plan's 2 and 1"):
        decoding = opened(model, condition_of(model, 1), Ragged(nodes=2, levels=1))
        decoding.admit(torch.zeros(1, 1, dtype=torch.long))
        decoding.verify(torch.zeros(1, 3, 1, dtype=torch.long), Tree.chain(3))
    vq, flextok = (build(compose_config("sample", [f"tokenizer={name}", "checkpoint=none"]).tokenizer)
                   for name in ("vq_f2", "flextok_tiny"))
    with pytest.raises(ValueError, match=r"compares codes, and FlexTok.* has no codebook.*sampler=sjd"):
        equip(relaxed, model, flextok)
    assert vq.stored_codebook() is vq.embedding.weight
