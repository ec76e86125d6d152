from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.test_rqvae import small_tokenizer
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, LinearInTokens
from varzoo.generators.base import Batch, Condition
from varzoo.generators.masked import MaskPlan
from varzoo.generators.resgen import LevelMaskPlan, ResGen, masked_counts, share_of, shown_by_confidence
from varzoo.loading import Model, build, compose_config, fit_together
from varzoo.nn.code_tables import code_tables, look_up, requantise, sum_levels
from varzoo.nn.gaussian_mixture import GaussianMixture, GaussianMixtureHead
from varzoo.predictions.mixture import MixturePrediction
from varzoo.samplers import Autoregressive

HEIGHT, WIDTH, DEPTH, CODES, CHANNELS = 2, 3, 3, 12, 8  # as in small_tokenizer, not a square
LENGTH, SLOTS = HEIGHT * WIDTH, HEIGHT * WIDTH * DEPTH
SPEC = TokenSpec(kind="discrete", shape=(HEIGHT, WIDTH), size=CODES, depth=DEPTH)


def small_generator(shared: bool = True, **options) -> ResGen:
    torch.manual_seed(1)
    config = {"spec": SPEC, "num_classes": 7, "code_channels": CHANNELS, "width": 32, "depth": 2, "heads": 4,
              "mlp_ratio": 2.0, "components": 5, "rank": 3, "least_std": 0.05, "loss": "bound", "class_drop": 0.1}
    model = ResGen(**(config | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tables = torch.randn(1 if shared else model.spec.depth, model.spec.size, CHANNELS)
    model.use_codebook(tables[0] if shared else tables)
    return model.eval()


def small_mixture(shape: tuple[int, ...] = (4,), components: int = 5) -> GaussianMixture:
    head = GaussianMixtureHead(width=16, channels=CHANNELS, components=components, rank=3, least_std=0.05)
    return head(3 * torch.randn(*shape, 16))


def means_of(mixture: GaussianMixture) -> Tensor:
    """All means `[..., V, C]`, as the formula has them."""
    return mixture.shift[..., None, :] + mixture.scale[..., None, :] * mixture.centres


def draw(model: ResGen, labels: list[int], samples: list[int] | range, **settings) -> Tensor:
    plan = LevelMaskPlan(**({"steps": 6} | settings.pop("plan", {})))
    sampler = Autoregressive(plan=plan, guidance=settings.pop("guidance", None), draw=settings)
    return sampler.sample(model, Condition.classes(torch.tensor(labels)), Draws(5, tuple(samples))).tokens


# Masks: how many codes of a position are masked


@pytest.mark.parametrize("count", [0, 1, 7, SLOTS - 1, SLOTS])
def test_masks_add_up_and_fit_into_positions(count: int) -> None:
    order = Draws(0, range(50)).permutation("slots", SLOTS)
    counts = masked_counts(order, torch.full((50,), count), DEPTH)
    assert counts.shape == (50, LENGTH) and (counts.sum(1) == count).all()
    assert counts.min() >= 0 and counts.max() <= DEPTH
    for row in range(3):
        first = order[row, :count].tolist()
        assert counts[row].tolist() == [sum(slot // DEPTH == place for slot in first) for place in range(LENGTH)]


def test_masked_counts_are_hypergeometric() -> None:
    rows, count = 4000, 7
    order = Draws(3, range(rows)).permutation("slots", SLOTS)
    counts = masked_counts(order, torch.full((rows,), count), DEPTH).double()
    share = 1 / LENGTH
    variance = count * share * (1 - share) * (SLOTS - count) / (SLOTS - 1)
    torch.testing.assert_close(counts.mean(0), torch.full((LENGTH,), count * share).double(), atol=0.06, rtol=0)
    torch.testing.assert_close(counts.var(0), torch.full((LENGTH,), variance).double(), atol=0.08, rtol=0)
    for masked in range(DEPTH + 1):
        exact = math.comb(DEPTH, masked) * math.comb(SLOTS - DEPTH, count - masked) / math.comb(SLOTS, count)
        assert (counts == masked).double().mean().item() == pytest.approx(exact, abs=0.015)


def test_fewer_masked_codes_are_a_later_state_of_the_same_process() -> None:
    order = Draws(0, range(20)).permutation("slots", SLOTS)
    states = [masked_counts(order, torch.full((20,), count), DEPTH) for count in range(SLOTS, -1, -1)]
    for before, after in pairwise(states):
        change = before - after
        assert (change >= 0).all() and (change.sum(1) == 1).all()


def test_training_masks_a_cosine_share_of_the_codes() -> None:
    model, draws = small_generator(), Draws(0, range(200)).keyed(iteration=3)
    masked = DEPTH - model.training_mask(draws)
    rates = draws.uniform("mask_rate", dtype=torch.float64).tolist()
    assert masked.sum(1).tolist() == [math.ceil(math.cos(math.pi * rate / 2) * SLOTS) for rate in rates]
    assert masked.sum(1).min() >= 1 and masked.sum(1).max() == SLOTS
    shown = model.shown(DEPTH - masked)
    assert torch.equal(shown.sum(-1), DEPTH - masked)
    assert not (shown[..., 1:] & ~shown[..., :-1]).any()  # deeper codes never without the shallower ones


def test_shares_are_rounded_up_but_not_by_rounding_errors() -> None:
    assert share_of(math.cos(math.pi / 3), 10) == 5 and math.cos(math.pi / 3) * 10 > 5
    assert share_of(0.501, 10) == 6 and share_of(1.0, 10) == 10 and share_of(0.0, 10) == 0


# Code vectors


@pytest.mark.parametrize("shared", [True, False])
def test_visible_sum_and_masked_sum_are_the_whole_vector(shared: bool) -> None:
    model = small_generator(shared)
    ids, visible = torch.randint(CODES, (4, LENGTH, DEPTH)), torch.randint(DEPTH + 1, (4, LENGTH))
    shown = model.shown(visible)
    seen, masked = sum_levels(model.tables, ids, shown), sum_levels(model.tables, ids, ~shown)
    for row, place in [(0, 0), (1, 4), (3, 5)]:
        vectors = [model.tables[0 if shared else level][ids[row, place, level]] for level in range(DEPTH)]
        split = visible[row, place]
        torch.testing.assert_close(seen[row, place], sum(vectors[:split], torch.zeros(CHANNELS)))
        torch.testing.assert_close(masked[row, place], sum(vectors[split:], torch.zeros(CHANNELS)))
    torch.testing.assert_close(seen + masked, look_up(model.tables, ids).sum(-2))


@pytest.mark.parametrize("shared", [True, False])
def test_requantising_goes_level_by_level(shared: bool) -> None:
    tables = torch.randn(1 if shared else DEPTH, CODES, CHANNELS)
    ids, visible = torch.randint(CODES, (4, LENGTH, DEPTH)), torch.randint(DEPTH + 1, (4, LENGTH))
    vectors = 2 * torch.randn(4, LENGTH, CHANNELS)
    result = requantise(tables, vectors, ids, visible)
    for row in range(4):
        for place in range(LENGTH):
            expected, left = ids[row, place].tolist(), vectors[row, place]
            for level in range(visible[row, place], DEPTH):
                table = tables[0 if shared else level]
                expected[level] = min(range(CODES), key=lambda code: (left - table[code]).square().sum().item())
                left = left - table[expected[level]]
            assert result[row, place].tolist() == expected


def test_the_true_sum_often_gives_the_codes_back_and_always_at_the_last_level() -> None:
    tokenizer = small_tokenizer().eval()
    latents = torch.randn(300, 1, CHANNELS, generator=torch.Generator().manual_seed(6))
    ids, tables = tokenizer.quantizer(latents).ids, tokenizer.codebook()[None]
    for visible in range(DEPTH):
        state = torch.full((300, 1), visible)
        masked = torch.arange(DEPTH) >= state[..., None]
        found = requantise(tables, sum_levels(tables, ids, masked), ids, state)
        agreement = (found == ids)[masked].double().mean().item()  # greedy residuals differ: not all come back
        assert agreement == 1 if visible == DEPTH - 1 else 0.25 < agreement < 1


# The mixture


def test_densities_equal_a_mixture_of_normals() -> None:
    mixture, x = small_mixture((4, 3)), torch.randn(4, 3, CHANNELS)
    means = means_of(mixture)
    torch.testing.assert_close(mixture.squared_distances(x), (x[..., None, :] - means).square().sum(-1), atol=1e-4,
                               rtol=1e-4)
    std = mixture.variance.sqrt()[..., None, None].expand_as(means)
    expected = MixtureSameFamily(Categorical(logits=mixture.logits), Independent(Normal(means, std), 1)).log_prob(x)
    torch.testing.assert_close(mixture.log_density(x), expected, atol=1e-3, rtol=1e-4)
    component = torch.randint(5, (4, 3))
    torch.testing.assert_close(mixture.means(component), means.gather(-2, component[..., None, None].expand(
        -1, -1, 1, CHANNELS))[..., 0, :])


def test_means_are_an_affine_map_of_centres_and_a_low_rank_term() -> None:
    head = GaussianMixtureHead(width=16, channels=CHANNELS, components=5, rank=3, least_std=0.05)
    hidden = torch.randn(16)
    shift, scale = head.affine(hidden).chunk(2)
    mixture = head(hidden)
    for component in range(5):
        inner = head.centres[component] + head.basis @ head.coefficients(hidden)
        torch.testing.assert_close(mixture.means(torch.tensor(component)), shift + (1 + scale) * inner)
    assert mixture.variance.item() == pytest.approx(head.log_variance(hidden).exp().item() + 0.05**2)


def test_the_bound_is_its_formula_and_lies_above_the_likelihood() -> None:
    mixture, x = small_mixture((6,)), torch.randn(6, CHANNELS)
    regression, classification = mixture.bound(x)
    means, weights = means_of(mixture), mixture.logits.softmax(-1)
    for row in range(6):
        terms = [(x[row] - means[row, v]).square().sum().item() / (2 * mixture.variance[row].item()) for v in range(5)]
        q = torch.tensor([-term for term in terms]).softmax(0).tolist()
        constant = CHANNELS / 2 * math.log(2 * math.pi * mixture.variance[row].item())
        assert regression[row].item() == pytest.approx(sum(map(float.__mul__, q, terms)) + constant, abs=1e-3)
        divergence = sum(share * math.log(share / weights[row, v].item()) for v, share in enumerate(q) if share > 0)
        assert classification[row].item() == pytest.approx(divergence, abs=1e-3)
    assert (regression + classification >= -mixture.log_density(x) - 1e-4).all()


def test_responsibilities_are_held_constant() -> None:
    """The gradient by a mean is its share of the pull alone, not what the shares would gain by moving."""
    logits, shift = torch.zeros(2), torch.zeros(1, requires_grad=True)
    mixture = GaussianMixture(logits=logits, shift=shift, scale=torch.ones(1), centres=torch.tensor([[-1.0], [2.0]]),
                              variance=torch.tensor(1.0))
    sum(mixture.bound(torch.tensor([0.5]))).backward()
    q = torch.tensor([-1.5**2 / 2, -1.5**2 / 2]).softmax(0)
    expected = -(q * torch.tensor([1.5, -1.5])).sum()
    torch.testing.assert_close(shift.grad, expected[None], atol=1e-6, rtol=0)


def test_one_component_is_a_squared_error() -> None:
    mixture, x = small_mixture((6,), components=1), torch.randn(6, CHANNELS)
    regression, classification = mixture.bound(x)
    error = (x - means_of(mixture)[:, 0]).square().sum(-1) / (2 * mixture.variance)
    torch.testing.assert_close(regression, error + CHANNELS / 2 * (2 * math.pi * mixture.variance).log())
    assert (classification.abs() < 1e-6).all()


def test_draws_follow_the_mixture() -> None:
    rows = 4000
    one = small_mixture((1,), components=3)
    mixture = replace(one, **{name: getattr(one, name)[None].expand(rows, 1, -1)
                              for name in ("logits", "shift", "scale")}, variance=one.variance[None].expand(rows, 1))
    prediction = MixturePrediction(mixture=mixture, positions=torch.zeros(rows, 1, dtype=torch.long), redraw=0)
    draws, means, weights = Draws(2, range(rows)), means_of(one)[0], one.logits.softmax(-1)[0]
    drawn = prediction.draw(draws).tokens[:, 0]
    torch.testing.assert_close(drawn.mean(0), weights @ means, atol=0.12, rtol=0.05)
    cold = prediction.draw(draws, temperature=0.0).tokens[:, 0]
    nearest = torch.cdist(cold, means).argmin(1)
    torch.testing.assert_close(cold, means[nearest], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nearest.bincount(minlength=3) / rows, weights, atol=0.03, rtol=0)
    spread = (drawn - cold).square().mean().item()
    assert spread == pytest.approx(one.variance.item(), rel=0.05)
    greedy = prediction.draw(draws, temperature=0.0, top_p=1e-3).tokens[:, 0]
    torch.testing.assert_close(greedy, means[weights.argmax()].expand_as(greedy), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="need temperature >= 0 and 0 < top_p <= 1, got temperature=-1, top_p=1"):
        prediction.draw(draws, temperature=-1.0)


# The generator


@pytest.mark.parametrize("loss", ["bound", "likelihood"])
def test_the_loss_is_the_mean_over_positions_with_masked_codes(loss: str) -> None:
    model, draws = small_generator(loss=loss, class_drop=0.5), Draws(0, range(4)).keyed(iteration=2)
    ids, labels = torch.randint(CODES, (4, LENGTH, DEPTH)), torch.tensor([0, 3, 3, 6])
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    found = model.loss(Batch(tokens=ids, condition=Condition.classes(labels), weights=weights), draws, 0.0)
    visible, dropped = model.training_mask(draws), draws.uniform("drop_label") < 0.5
    assert dropped.any() and not dropped.all() and (visible == DEPTH).any()
    total = 0.0
    for row in range(4):
        mixture = model.mixture(ids[row:row + 1], visible[row:row + 1],
                                torch.tensor([7]) if dropped[row] else labels[row:row + 1])
        values = []
        for place in range(LENGTH):
            if visible[row, place] == DEPTH:
                continue
            target = sum(model.tables[0][ids[row, place, level]] for level in range(visible[row, place], DEPTH))
            x = target.expand(1, LENGTH, -1)
            value = -mixture.log_density(x) if loss == "likelihood" else sum(mixture.bound(x))
            values.append(value[0, place].item())
        total += weights[row].item() * sum(values) / len(values) / 4.0
    assert found.total.item() == pytest.approx(total, rel=1e-4)
    assert set(found.parts) == ({"likelihood"} if loss == "likelihood" else {"regression", "classification"})


def test_only_what_is_shown_is_read() -> None:
    model, labels = small_generator(), torch.tensor([2])
    ids, visible = torch.randint(CODES, (1, LENGTH, DEPTH)), torch.tensor([[0, 1, 2, 3, 1, 0]])
    before = model.mixture(ids, visible, labels).logits
    for place in range(LENGTH):
        for level in range(DEPTH):
            other = ids.clone()
            other[0, place, level] = (other[0, place, level] + 1) % CODES
            changed = not torch.equal(model.mixture(other, visible, labels).logits, before)
            assert changed == (level < visible[0, place])
    fewer = model.mixture(ids, torch.zeros_like(visible), labels).logits
    assert not torch.allclose(fewer, before)


def test_the_scale_of_the_code_vectors_does_not_matter() -> None:
    model, draws = small_generator(), Draws(0, range(2))
    tables = torch.randn(CODES, CHANNELS)
    batch = Batch(tokens=torch.randint(CODES, (2, LENGTH, DEPTH)), condition=Condition.classes(torch.tensor([1, 2])))
    losses = []
    for factor in (1.0, 0.01, 100.0):
        model.use_codebook(factor * tables)
        losses.append(model.loss(batch, draws, 0.0).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-4, atol=0)


def test_it_learns_what_a_position_holds() -> None:
    torch.manual_seed(0)
    model = small_generator(components=16, class_drop=0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.head.centres.data.normal_()
    ids = torch.randint(CODES, (2, LENGTH, DEPTH), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        batch = Batch(tokens=ids.repeat(8, 1, 1), condition=Condition.classes(torch.tensor([0, 1] * 8)))
        optimizer.zero_grad()
        model.loss(batch, Draws(0, range(16)).keyed(iteration=step), 0.0).total.backward()
        optimizer.step()
    drawn = draw(model, [0, 1], range(2), temperature=0.3)
    whole = lambda codes: look_up(model.tables, codes).sum(-2)  # noqa: E731
    error = (whole(drawn) - whole(ids)).square().mean() / whole(ids).square().mean()
    assert error < 0.4  # two unlike vectors: 2


# Decoding


def naive_decoding(model: ResGen, labels: Tensor, draws: Draws, plan: LevelMaskPlan, scale: float) -> Tensor:
    """The loop of the paper, one sample, one position and one code at a time."""
    size, tables = len(labels), model.tables
    ids, visible = torch.zeros(size, LENGTH, DEPTH, dtype=torch.long), torch.zeros(size, LENGTH, dtype=torch.long)
    positions, null = torch.arange(LENGTH).expand(size, -1), torch.full_like(labels, 7)
    masked = SLOTS
    for t in range(1, plan.steps + 1):
        left = 0 if t == plan.steps else math.ceil(math.cos(math.pi / 2 * t / plan.steps) * SLOTS - 1e-6)
        if left == masked:
            continue
        w = 1 + (scale - 1) * (1 - left / SLOTS)
        conditional, unconditional = model.mixture(ids, visible, labels), model.mixture(ids, visible, null)
        logits = unconditional.logits + w * (conditional.logits - unconditional.logits)
        means = means_of(unconditional) + w * (means_of(conditional) - means_of(unconditional))
        uniforms = draws.uniform("component", at=positions, redraw=t - 1)
        noise = draws.normal("noise", (CHANNELS,), at=positions, redraw=t - 1)
        gumbels = draws.gumbel("confidence", at=positions, redraw=t - 1)
        for row in range(size):
            candidates, confidence = ids[row].clone(), []
            for place in range(LENGTH):
                weights = logits[row, place].softmax(0)
                component = int((weights.double().cumsum(0) <= uniforms[row, place]).sum())
                variance = conditional.variance[row, place]
                z = means[row, place, component] + variance.sqrt() * noise[row, place]
                densities = torch.stack([Normal(mean, variance.sqrt()).log_prob(z).sum()
                                         for mean in means[row, place]])
                confidence.append((weights.log() + densities).logsumexp(0).item()
                                  + plan.noise * (1 - t / plan.steps) * gumbels[row, place].item())
                for level in range(visible[row, place], DEPTH):
                    code = (z - tables[0]).square().sum(-1).argmin()
                    candidates[place, level] = code
                    z = z - tables[0][code]
            before = visible[row].clone()
            for _ in range(masked - left):
                open_ = [place for place in range(LENGTH) if visible[row, place] < DEPTH]
                best = max(open_, key=lambda place: confidence[place] - plan.spread * (
                    visible[row, place] - before[place]).item())
                visible[row, best] += 1
            for place in range(LENGTH):
                for level in range(before[place], visible[row, place]):
                    ids[row, place, level] = candidates[place, level]
        masked = left
    return ids


@pytest.mark.parametrize(("spread", "noise", "scale"), [(0.0, 0.0, 1.0), (0.0, 4.0, 2.5), (3.0, 1.0, 2.5)])
def test_decoding_is_the_loop_of_the_paper(spread: float, noise: float, scale: float) -> None:
    model, labels, draws = small_generator(), torch.tensor([1, 4, 6]), Draws(5, (3, 4, 9))
    settings = {"steps": 5, "spread": spread, "noise": noise}
    expected = naive_decoding(model, labels, draws, LevelMaskPlan(**settings), scale)
    assert torch.equal(draw(model, labels.tolist(), (3, 4, 9), plan=settings, guidance=LinearInTokens(scale)), expected)


@pytest.mark.parametrize("settings", [{"choice": "random"}, {"spread": 2.0}, {"noise": 1.0}], ids=str)
def test_codes_appear_as_planned_and_then_stay(settings: dict) -> None:
    model, draws = small_generator(), Draws(0, range(4))
    plan = LevelMaskPlan(steps=7, **settings)
    decoding = model.begin(Condition.classes(torch.arange(4)), draws=draws, plan=plan)
    assert not decoding.visible.any() and not decoding.tokens.any()
    masked, indices = SLOTS, []
    for step in decoding.steps:
        before, visible = decoding.tokens, decoding.visible
        prediction = decoding.predict(step)
        decoding.commit(step, prediction.draw(draws).tokens, prediction.carry)
        left = 0 if step.index == 6 else math.ceil(math.cos(math.pi / 2 * (step.index + 1) / 7) * SLOTS)
        assert (step.drawn, step.left, step.total) == (SLOTS - masked, left, SLOTS)
        assert ((DEPTH - decoding.visible).sum(1) == left).all() and (decoding.visible >= visible).all()
        kept = model.shown(visible)
        assert torch.equal(decoding.tokens[kept], before[kept])
        assert not decoding.tokens[~model.shown(decoding.visible)].any()
        masked, indices = left, [*indices, step.index]
    assert masked == 0 and indices == sorted(indices)


def test_steps_that_show_nothing_are_skipped() -> None:
    model = small_generator()
    decoding = model.begin(Condition.nothing(2), draws=Draws(0, (0, 1)), plan=LevelMaskPlan(steps=63))
    steps = [*decoding._plan]
    assert len(steps) < 63 and steps[0].index > 0 and all(step.of == 63 for step in steps)
    assert [step.drawn + step.left for step in steps[:1]] == [steps[0].left] and steps[-1].left == 0
    assert all(after.drawn == SLOTS - before.left for before, after in pairwise(steps))


def test_without_spread_positions_are_shown_as_a_whole() -> None:
    confidence, visible = torch.tensor([[0.3, 2.0, 1.0, 2.0]]), torch.tensor([[0, 1, 0, 0]])
    assert shown_by_confidence(confidence, visible, 4, 3, 0.0).tolist() == [[0, 3, 0, 2]]
    assert shown_by_confidence(confidence, visible, 6, 3, 0.0).tolist() == [[0, 3, 1, 3]]
    assert shown_by_confidence(confidence, visible, 4, 3, 1e6).tolist() == [[1, 2, 1, 1]]
    assert shown_by_confidence(confidence, visible, 3, 3, 1e6).tolist() == [[0, 2, 1, 1]]
    assert shown_by_confidence(confidence, visible, 11, 3, 0.5).tolist() == [[3, 3, 3, 3]]


def test_the_random_choice_reverses_the_masking_of_training() -> None:
    model, rows = small_generator(), 1500
    plan = LevelMaskPlan(steps=3, choice="random")
    draws = Draws(0, range(rows))
    decoding = model.begin(Condition.nothing(rows), draws=draws, plan=plan)
    step = next(iter(decoding.steps))
    prediction = decoding.predict(step)
    decoding.commit(step, prediction.draw(draws).tokens, prediction.carry)
    share, masked = 1 / LENGTH, (DEPTH - decoding.visible).double()
    variance = step.left * share * (1 - share) * (SLOTS - step.left) / (SLOTS - 1)
    torch.testing.assert_close(masked.mean(0), torch.full((LENGTH,), step.left * share).double(), atol=0.06, rtol=0)
    torch.testing.assert_close(masked.var(0), torch.full((LENGTH,), variance).double(), atol=0.08, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"plan": {"choice": "random"}}, {"guidance": Constant(3.0)},
                                      {"temperature": 0.5, "top_p": 0.7, "plan": {"spread": 1.0, "noise": 2.0}}],
                         ids=str)
def test_an_image_does_not_depend_on_its_batch(settings: dict) -> None:
    model = small_generator()
    together = draw(model, [0, 1, 2, 3, 4, 5], range(6), **dict(settings))
    order = [5, 0, 3]
    assert torch.equal(draw(model, order, order, **dict(settings)), together[order])
    assert torch.equal(draw(model, [4], [4], **dict(settings)), together[4:5])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 6


def test_two_decodings_at_once_and_a_step_committed_again() -> None:
    model, draws, plan = small_generator(), Draws(5, (0, 1)), LevelMaskPlan(steps=6)
    conditions = [Condition.classes(torch.tensor(labels)) for labels in ([1, 2], [3, 4])]
    decodings = [model.begin(condition, draws=draws, plan=plan) for condition in conditions]
    for steps in zip(*(decoding.steps for decoding in decodings)):
        predictions = [decoding.predict(step) for decoding, step in zip(decodings, steps)]
        for decoding, step, prediction in zip(decodings, steps, predictions):
            drawn = prediction.draw(draws).tokens
            decoding.commit(step, torch.zeros_like(drawn), prediction.carry)
            again = decoding.predict(step)  # as before the step, though it has been committed
            assert torch.equal(again.mixture.logits, prediction.mixture.logits)
            decoding.commit(step, drawn, again.carry)
    for decoding, labels in zip(decodings, ([1, 2], [3, 4])):
        assert torch.equal(decoding.tokens, draw(model, labels, (0, 1)))


def test_guidance_acts_on_logits_and_means() -> None:
    model, draws = small_generator(), Draws(0, (0, 1))
    labels = torch.tensor([2, 5])

    def first(guidance: Constant | None, condition: Condition) -> GaussianMixture:
        decoding = model.begin(condition, draws=draws, guidance=guidance, plan=LevelMaskPlan(steps=2))
        return decoding.predict(next(iter(decoding.steps))).mixture

    conditional, null = (first(None, condition) for condition in (Condition.classes(labels), Condition.nothing(2)))
    guided = first(Constant(2.5), Condition.classes(labels))
    torch.testing.assert_close(guided.logits, conditional.logits + 1.5 * (conditional.logits - null.logits))
    torch.testing.assert_close(means_of(guided), means_of(conditional) + 1.5 * (means_of(conditional) - means_of(null)))
    assert torch.equal(guided.variance, conditional.variance)
    unguided = first(Constant(1.0), Condition.classes(labels))
    assert torch.equal(unguided.logits, conditional.logits)


def test_the_number_of_evaluations_does_not_depend_on_depth() -> None:
    counts = []
    for depth in (1, 2, 8):
        model = small_generator(spec=replace(SPEC, depth=depth))
        sampler = Autoregressive(plan=LevelMaskPlan(steps=2))
        sampled = sampler.sample(model, Condition.nothing(2), Draws(0, (0, 1)))
        counts.append(sampled.counts.backbone_evaluations)
        assert sampled.tokens.shape == ((2, LENGTH) if depth == 1 else (2, LENGTH, depth))
    assert counts == [2, 2, 2]


# Composition


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"depth": 1}, {"depth": 5, "shared": False}], ids=str)
def test_any_residual_tokenizer_is_sampled_by_the_plain_loop(options: dict) -> None:
    tokenizer = small_tokenizer(**options).eval()
    model = Model(tokenizer=tokenizer, generator=small_generator(spec=tokenizer.spec),
                  sampler=Autoregressive(plan=LevelMaskPlan(steps=2), guidance=LinearInTokens(2.0)))
    images, counts = model.sample([1, 2])
    assert images.shape == (2, 3, 4, 6) and images.dtype == torch.uint8 and counts.steps == 2
    batch = Batch(tokens=tokenizer.encode(torch.rand(2, 3, 4, 6)), condition=Condition.classes(torch.tensor([1, 2])))
    assert model.generator.loss(batch, Draws(0, (0, 1)), 0.0).total.isfinite()


def test_a_plain_codebook_is_a_code_of_depth_one() -> None:
    tokenizer = build(compose_config("train", ["experiment=digits_vq"]).tokenizer).eval()
    channels = tokenizer.codebook().shape[-1]
    generator = ResGen(spec=tokenizer.spec, num_classes=10, code_channels=channels, width=32, depth=1, heads=2,
                       mlp_ratio=2.0, components=4, rank=2, least_std=0.05, loss="bound", class_drop=0.1)
    fit_together(tokenizer, generator)
    plan = LevelMaskPlan(steps=3)
    tokens = Autoregressive(plan=plan).sample(generator, Condition.classes(torch.tensor([3])), Draws(0, (0,))).tokens
    assert tokens.shape == (1, tokenizer.spec.length) and tokens.max() < tokenizer.spec.size
    assert tokenizer.decode(tokens).shape[1] == 3


def test_codes_that_do_not_add_up_are_refused() -> None:
    tokenizer = build(compose_config("train", ["experiment=digits_bae"]).tokenizer)
    with pytest.raises(ValueError, match="BinaryTokenizer has no codebook, which this generator embeds its codes with"):
        fit_together(tokenizer, small_generator(spec=tokenizer.spec))


def test_published_size() -> None:
    """The paper says 576M parameters for rvq16."""
    config = compose_config("sample", ["generator=resgen_rvq16", "checkpoint=none"]).generator
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(config).parameters())
    assert abs(count / 1e6 - 576) < 12


def test_bad_input_is_refused() -> None:
    model, draws = small_generator(), Draws(0, (0, 1))
    with pytest.raises(ValueError, match=r"give plan=LevelMaskPlan\(steps=\.\.\.\), such as 63, got None"):
        model.begin(Condition.nothing(2), draws=draws)
    with pytest.raises(ValueError, match=r"give plan=LevelMaskPlan"):
        model.begin(Condition.nothing(2), draws=draws, plan=MaskPlan(steps=3))
    with pytest.raises(ValueError, match="unknown choice of what is shown first 'confident'"):
        LevelMaskPlan(steps=3, choice="confident")
    with pytest.raises(ValueError, match="the spread over positions must be at least 0, got -1"):
        LevelMaskPlan(steps=3, spread=-1.0)
    with pytest.raises(ValueError, match=r"guidance scale 0\.5 is below 1"):
        model.begin(Condition.nothing(2), draws=draws, plan=LevelMaskPlan(steps=3), guidance=Constant(0.5))
    with pytest.raises(ValueError, match="unknown class id 7: this generator knows 0 to 6"):
        model.begin(Condition.classes(torch.tensor([0, 7])), draws=draws, plan=LevelMaskPlan(steps=3))
    with pytest.raises(ValueError, match="ResGen models discrete tokens whose code vectors add up, got continuous"):
        small_generator(spec=TokenSpec(kind="continuous", shape=(2, 2), size=4))
    with pytest.raises(ValueError, match=r"unknown loss of a mixture 'bounds'\. Did you mean 'bound'"):
        small_generator(loss="bounds")
    with pytest.raises(ValueError, match="need 0 <= class_drop <= 1, got 2"):
        small_generator(class_drop=2)
    with pytest.raises(ValueError, match=r"need components, rank >= 1 and least_std > 0, got 0, 3 and 0\.05"):
        small_generator(components=0)
    with pytest.raises(ValueError, match=r"expected ids \[B, 6, 3\] for .*, got \[2, 6, 2\]"):
        model.loss(Batch(tokens=torch.zeros(2, 6, 2, dtype=torch.long), condition=Condition.nothing(2)), draws, 0.0)
    with pytest.raises(ValueError, match=r"embeds 12 codes of 8 channels, one codebook or one for each of 3 levels; "
                                         r"the tokenizer has \[2, 12, 8\]"):
        model.use_codebook(torch.zeros(2, CODES, CHANNELS))
    with pytest.raises(ValueError, match="has none yet: compose the two"):
        unfed = small_generator()
        unfed.codebook = None
        unfed.loss(Batch(tokens=torch.zeros(2, 6, 3, dtype=torch.long), condition=Condition.nothing(2)), draws, 0.0)
    with pytest.raises(ValueError, match="one codebook or one for each"):
        code_tables(torch.zeros(13, 8), size=12, channels=8, levels=3)
    with pytest.raises(ValueError, match="draw option 'top_k' does not fit: ResGen predicts MixturePrediction"):
        Autoregressive(plan=LevelMaskPlan(steps=3), draw={"top_k": 5}).check(model)
