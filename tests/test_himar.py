"""Hi-MAR: its two phases, its two heads, what they hand over, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden_case import fill
from varzoo.cli.drawing import sample as draw_images
from varzoo.core.checkpoint import load_strictly, save_weights
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Anneal, Constant, LinearInTokens
from varzoo.demo import guided
from varzoo.generators.base import Batch, Condition
from varzoo.generators.himar import HiMAR, HiMARDecoding
from varzoo.generators.masked import CosineRate, MaskPlan, TruncatedNormalRate
from varzoo.loading import build as build_config
from varzoo.loading import compose_config, load, register_run
from varzoo.nn import denoiser
from varzoo.nn.diffusion import Diffusion
from varzoo.nn.diffusion_transformer import DiffusionTransformer, position_table
from varzoo.nn.rows import take_rows
from varzoo.nn.solvers import DDIM, DDPM, Known
from varzoo.predictions.diffusion import MapDiffusionPrediction
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.run import train

GRID, PIVOTS = (3, 5), (2, 3)
PLAN = {"pivot": MaskPlan(steps=3), "dense": MaskPlan(steps=2)}
# The lower half of the timesteps: with random weights the upper half amplifies rounding errors.
DRAW = {"pivot": {"steps": "4,0"}, "dense": {"steps": "5,0"}}
TINY = {
    "spec": TokenSpec(kind="continuous", shape=GRID, size=4), "pivot_shape": PIVOTS, "num_classes": 6,
    "encoder_width": 24, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16, "decoder_depth": 2,
    "decoder_heads": 2, "mlp_ratio": 2.0, "buffer_size": 3, "norm_eps": 1e-6, "head_width": 16, "head_depth": 1,
    "map_head_width": 16, "map_head_depth": 2, "map_head_heads": 2, "map_head_mlp_ratio": 2.0,
    "noise_schedule": "cosine", "noise_steps": 1000, "head_batch": 2, "pivot_mask_rate": TruncatedNormalRate(low=0.5),
    "dense_mask_rate": CosineRate(), "pivot_weight": 0.4, "dense_weight": 0.6, "class_drop": 0.1, "pivot_keep": 0.25,
    "pivot_warmup": 0.125, "attention_dropout": 0.0, "projection_dropout": 0.0,
}


def build(**changes: Any) -> HiMAR:
    return HiMAR(**TINY | changes)


def filled(**changes: Any) -> HiMAR:
    """A HiMAR whose layers all matter (new heads are zero)."""
    model = build(**changes).eval()
    state = {name: torch.from_numpy(fill(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    load_strictly(model, state, "the test")
    return model


@pytest.fixture
def model() -> HiMAR:
    return filled()


def labels(*ids: int) -> Condition:
    return Condition.classes(torch.tensor(ids))


def both(pivot: float, dense: float) -> dict[str, LinearInTokens]:
    return {"pivot": LinearInTokens(pivot), "dense": LinearInTokens(dense)}


def sample(model: HiMAR, condition: Condition, draws: Draws, *, guidance: Any = None, plan: Any = PLAN,
           draw: Any = DRAW) -> Tensor:
    return Autoregressive(guidance=guidance, plan=plan, draw=draw).sample(model, condition, draws).tokens


def until_dense(model: HiMAR, *ids: int, guidance: Any = None) -> tuple[HiMARDecoding, Any]:
    """A decoding at its first dense step."""
    draws = Draws(0, tuple(range(len(ids))))
    with torch.no_grad():
        decoding = model.begin(labels(*ids), draws=draws, guidance=guidance, plan=PLAN)
        for step in decoding.steps:
            if step.phase == "dense":
                return decoding, step
            prediction = decoding.predict(step)
            decoding.commit(step, prediction.draw(draws, **DRAW["pivot"]).tokens, prediction.carry)
    raise AssertionError("no dense step")


@pytest.mark.parametrize("guidance", [None, both(3.0, 2.0)])
def test_an_image_does_not_depend_on_its_batch(model: HiMAR, guidance: Any) -> None:
    together = sample(model, labels(0, 1, 2, 3, 4), Draws(7, range(5)), guidance=guidance)
    alone = sample(model, labels(2), Draws(7, (2,)), guidance=guidance)
    permuted = sample(model, labels(4, 2, 0), Draws(7, (4, 2, 0)), guidance=guidance)
    assert torch.allclose(alone[0], together[2], atol=1e-4)
    assert torch.allclose(permuted, together[[4, 2, 0]], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_two_decodings_at_once(model: HiMAR) -> None:
    draws = [Draws(seed, (0, 1)) for seed in (3, 4)]
    expected = [sample(model, labels(1, 2), each) for each in draws]
    with torch.no_grad():
        decodings = [model.begin(labels(1, 2), draws=each, plan=PLAN) for each in draws]
        for steps in zip(*(decoding.steps for decoding in decodings)):
            predictions = [decoding.predict(step) for decoding, step in zip(decodings, steps)]
            for decoding, step, prediction, each in zip(decodings, steps, predictions, draws):
                decoding.commit(step, prediction.draw(each, **DRAW[step.phase]).tokens, prediction.carry)
    assert all(torch.allclose(decoding.tokens, tokens, atol=1e-4) for decoding, tokens in zip(decodings, expected))


@pytest.mark.parametrize(("grid", "pivots"), [((3, 5), (2, 3)), ((1, 7), (1, 1)), ((4, 2), (4, 4))])
def test_grids_of_any_shape_are_filled(grid: tuple[int, int], pivots: tuple[int, int]) -> None:
    model = filled(spec=TokenSpec(kind="continuous", shape=grid, size=4), pivot_shape=pivots)
    tokens = sample(model, labels(0, 5), Draws(1, (0, 1)), guidance=both(2.0, 2.0),
                    plan={"pivot": MaskPlan(steps=30), "dense": MaskPlan(steps=30)})  # more steps than tokens
    assert tokens.shape == (2, grid[0] * grid[1], 4) and torch.isfinite(tokens).all() and (tokens != 0).all()


def test_predictions_are_idempotent_and_commits_overwrite(model: HiMAR) -> None:
    decoding, draws = model.begin(labels(1, 2), draws=Draws(0, (0, 1)), plan=PLAN), Draws(0, (0, 1))
    with torch.no_grad():
        for step in decoding.steps:
            before = decoding.predict(step)
            drawn = before.draw(draws, **DRAW[step.phase]).tokens
            wrong_carry = None if before.carry is None else before.carry + 1
            decoding.commit(step, drawn + 1, wrong_carry)
            decoding.commit(step, drawn, before.carry)
            again = decoding.predict(step)
            assert torch.equal(again.condition, before.condition)
            assert torch.equal(again.draw(draws, **DRAW[step.phase]).tokens, drawn)
            held = decoding.pivots if step.phase == "pivot" else decoding.tokens
            assert torch.equal(take_rows(held, step.positions), drawn)
            if step.phase == "pivot":
                assert torch.equal(take_rows(decoding.hidden, step.positions), before.condition[0])


def test_the_dense_phase_sees_hidden_vectors_not_pivots(model: HiMAR) -> None:
    decoding, step = until_dense(model, 1, 2)
    before = decoding.predict(step).condition
    decoding.pivots = decoding.pivots + 1
    assert torch.equal(decoding.predict(step).condition, before)
    decoding.hidden = decoding.hidden + 1
    assert not torch.allclose(decoding.predict(step).condition, before)


def test_pivots_that_were_never_drawn_are_the_learned_null(model: HiMAR) -> None:
    with torch.no_grad():
        decoding = model.begin(labels(1), draws=Draws(0, (0,)), plan=PLAN)
        dense = next(step for step in decoding.steps if step.phase == "dense")  # the pivot phase is abandoned
        before = decoding.predict(dense).condition
        model.hidden_embed.bias += 1
        assert torch.equal(decoding.predict(dense).condition, before)
        model.null_pivots += 1
        assert not torch.allclose(decoding.predict(dense).condition, before)


def test_the_null_branch_of_the_dense_phase_sees_the_same_pivots(model: HiMAR) -> None:
    decoding, step = until_dense(model, 1, 2, guidance={"pivot": Constant(2.0), "dense": Constant(2.0)})
    _, null = decoding.predict(step).condition
    unconditional, _ = until_dense(model, 1, 2)
    unconditional.vectors, unconditional.hidden = model.null_class.expand(2, -1), decoding.hidden
    assert torch.allclose(unconditional.predict(step).condition[0], null, atol=1e-5)


def test_branches_run_as_one_batch_and_only_where_guided(model: HiMAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published setting without guidance is 1 for the map and more for the pivots."""
    batches, encode = [], model.backbone.encode_rows
    monkeypatch.setattr(model.backbone, "encode_rows",
                        lambda rows, *rest: batches.append(len(rows)) or encode(rows, *rest))
    plain = sample(model, labels(1, 2, 3), Draws(0, range(3)), guidance={"pivot": Constant(3.0), "dense": Constant(1)})
    assert batches == [6, 6, 6, 3, 3]
    batches.clear()
    half = sample(model, labels(1, 2, 3), Draws(0, range(3)), guidance={"pivot": Constant(3.0), "dense": None})
    assert batches == [6, 6, 6, 3, 3] and torch.equal(plain, half)


def test_schedules_and_tables_are_made_once(model: HiMAR, monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = [], Diffusion.__init__
    monkeypatch.setattr(Diffusion, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    monkeypatch.setattr("varzoo.nn.diffusion_transformer.position_table", lambda *args: 1 / 0)
    for seed in (0, 1):
        sample(model, labels(1), Draws(seed, (0,)))
    assert len(made) == 2  # "4,0" and "5,0"


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["pivot", "dense"])
@pytest.mark.parametrize("solver", [DDPM(), DDIM()])
def test_solver_steps_do_not_wait_for_the_host(model: HiMAR, phase: str, solver: Any) -> None:
    guidance = {"pivot": Constant(2.0), "dense": Constant(2.0)}
    decoding, step = until_dense(model, 1, 2, guidance=guidance)
    if phase == "pivot":
        decoding = model.begin(labels(1, 2), draws=Draws(0, (0, 1)), guidance=guidance, plan=PLAN)
        step = next(decoding.steps)
    prediction, waiting = decoding.predict(step), []
    for steps in (3, 9):
        with torch.no_grad(), Counting() as counting:
            prediction.draw(Draws(0, (0, 1)), steps=steps, solver=solver)
        # Reading a scalar or a count, and moving data of the host to the device: none of it in the loop.
        waiting.append([counting.counts[name] for name in ("_local_scalar_dense", "nonzero", "lift_fresh")])
        assert counting.counts["cumsum"] == 0 and counting.counts["mul"] > 10 * steps
    assert waiting[0] == waiting[1] and waiting[0][:2] == [0, 0]


def test_disa_anneals_each_phase(model: HiMAR) -> None:
    draw = {"pivot": {"steps": Anneal(12, 4)}, "dense": {"steps": Anneal(9, 3), "temperature": 0.9}}
    sampler = Autoregressive(plan=PLAN, draw=draw)
    counts = sampler.sample(model, labels(1), Draws(0, (0,))).counts
    assert counts.head_evaluations == (12 + 8 + 4) + (9 + 3) and counts.steps == 5


@torch.no_grad()
def test_weights_in_bfloat16(model: HiMAR) -> None:
    exact = sample(model, labels(1, 2), Draws(0, (0, 1)), guidance=both(2.0, 2.0))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded = sample(model, labels(1, 2), Draws(0, (0, 1)), guidance=both(2.0, 2.0))
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_losses_under_autocast(model: HiMAR) -> None:
    batch, draws = batch_of(3), Draws(0, range(3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(batch, draws, 1.0)
    rounded.total.backward()
    assert rounded.total.item() == pytest.approx(model.loss(batch, draws, 1.0).total.item(), rel=0.05)


def test_disa_by_config() -> None:
    anneal = "{_target_:varzoo.core.steps.Anneal,upper:50,lower:5}"
    config = compose_config("sample", ["model=himar_b", "checkpoint=none", f"sampler.draw.pivot.steps={anneal}"])
    sampler = build_config(config.sampler)
    assert sampler.draw["pivot"]["steps"] == Anneal(50, 5) and sampler.draw["dense"]["steps"] == 250


def test_one_setting_serves_both_phases(model: HiMAR) -> None:
    once = sample(model, labels(1), Draws(0, (0,)), guidance=Constant(2.0), plan=MaskPlan(steps=3),
                  draw={"steps": "5,0"})
    each = sample(model, labels(1), Draws(0, (0,)), guidance={"pivot": Constant(2.0), "dense": Constant(2.0)},
                  plan=dict.fromkeys(PLAN, MaskPlan(steps=3)), draw={phase: {"steps": "5,0"} for phase in PLAN})
    assert torch.equal(once, each)


@pytest.mark.parametrize(("settings", "message"), [
    ({"guidance": {"pivots": Constant(2.0), "dense": Constant(2.0)}}, "unknown phase 'pivots'. Did you mean 'pivot'"),
    ({"guidance": {"dense": Constant(2.0)}}, "needs all of pivot, dense; there is none for 'pivot'"),
    ({"plan": PLAN | {"main": MaskPlan(steps=1)}}, "unknown phase 'main'"),
    ({"plan": {"pivot": MaskPlan(steps=1), "dense": 4}}, r"Hi-MAR's dense phase leaves .* give plan=MaskPlan.*got 4"),
    ({"plan": None}, "Hi-MAR's pivot phase leaves"),
    ({"draw": {"pivot": {}, "dens": {}}}, "unknown phase 'dens'. Did you mean 'dense'"),
    ({"draw": {"pivot": {"top_k": 4}, "dense": {}}}, "'top_k' does not fit: HiMAR predicts DiffusionPrediction in ph"),
    ({"draw": {"temperature": 1.0, "dense": {}}}, "unknown phase 'temperature'"),
    ({"guidance": both(2.0, 0.5)}, r"guidance scale .* is below 1"),
    ({"condition": labels(6)}, "unknown class id 6: this generator knows 0 to 5"),
])
def test_bad_settings_are_refused(model: HiMAR, settings: dict[str, Any], message: str) -> None:
    good = {"condition": labels(0), "draws": Draws(0, (0,))}
    with pytest.raises(ValueError, match=message):
        sample(model, **good | settings)


def test_bad_sizes_and_commits_are_refused(model: HiMAR) -> None:
    with pytest.raises(ValueError, match="HiMAR models continuous tokens, got a spec of discrete"):
        build(spec=TokenSpec(kind="discrete", shape=GRID, size=4))
    with pytest.raises(ValueError, match=r"two grids \(h, w\), got \(15,\)"):
        build(spec=TokenSpec(kind="continuous", shape=(15,), size=4))
    with pytest.raises(ValueError, match="multiple of 4 and of its 2 heads, got 18"):
        build(map_head_width=18)
    with pytest.raises(ValueError, match=r"pivot_keep and pivot_warmup in \[0, 1\], got 2 and 0.125"):
        build(pivot_keep=2)
    decoding = model.begin(labels(1), draws=Draws(0, (0,)), plan=PLAN)
    step = next(decoding.steps)
    with pytest.raises(ValueError, match="committed together with their prediction's carry"):
        decoding.commit(step, torch.zeros(1, step.positions.shape[1], 4))


def map_prediction(*, known: Tensor, values: Tensor, scale: float = 2.0) -> MapDiffusionPrediction:
    """A prediction of a (3, 5) map, of positions 1 and 14."""
    head = DiffusionTransformer(grid=GRID, channels=4, out_channels=4, condition_width=6, width=16, depth=2, heads=2,
                                mlp_ratio=2.0)
    for name, parameter in head.named_parameters():
        parameter.data = torch.from_numpy(fill(name, tuple(parameter.shape)))
    generator = torch.Generator().manual_seed(0)
    return MapDiffusionPrediction(
        condition=torch.randn(2, 1, 15, 6, generator=generator), scale=scale, positions=torch.tensor([[1, 14]]),
        process=Diffusion.named("cosine", 1000), network=head, redraw=0, known=Known(mask=known, values=values))


@torch.no_grad()
def test_known_tokens_are_imposed_and_nothing_else_is_read() -> None:
    known, values, draws = torch.zeros(1, 15, 1, dtype=torch.bool), torch.zeros(1, 15, 4), Draws(0, (0,))
    known[0, [3, 7]] = True
    drawn = lambda values: map_prediction(known=known, values=values).draw(draws, steps="5,0").tokens  # noqa: E731
    before = drawn(values)
    hidden, shown = values.clone(), values.clone()
    hidden[0, 4], shown[0, 7] = 1.0, 1.0
    assert torch.equal(drawn(hidden), before) and not torch.allclose(drawn(shown), before, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("solver", [DDPM(), DDIM()])
def test_known_tokens_are_imposed_at_every_step_with_one_noise(solver: Any) -> None:
    known, values, seen = torch.zeros(1, 15, 1, dtype=torch.bool), torch.randn(1, 15, 4), []
    known[0, [3, 7]] = True
    prediction = map_prediction(known=known, values=values)

    def recorded(times: Tensor) -> Any:
        def estimate(noised: Tensor, k: int) -> Any:
            seen.append((k, noised))
            return inner(noised, k)
        inner = prediction.estimate_at(times)
        return estimate

    initial = torch.randn(1, 15, 4)
    solver.solve(recorded, prediction.process, initial, lambda k: torch.zeros(1, 15, 4), steps=3, temperature=1.0,
                 known=prediction.known)
    process = solver.respaced(prediction.process, 3)
    for k, noised in seen:
        expected = process.noised(values, 2 - k, initial)
        assert torch.allclose(noised[0, [3, 7]], expected[0, [3, 7]], atol=1e-6)
    assert [k for k, _ in seen] == [0, 1, 2]


def test_every_redraw_of_the_map_has_noise_of_its_own() -> None:
    first = map_prediction(known=torch.zeros(1, 15, 1, dtype=torch.bool), values=torch.zeros(1, 15, 4))
    second = MapDiffusionPrediction(**vars(first) | {"redraw": 1})
    tokens = [prediction.draw(Draws(0, (0,)), steps="5,0").tokens for prediction in (first, second, first)]
    assert torch.equal(tokens[0], tokens[2]) and not torch.allclose(tokens[0], tokens[1], atol=0.01)


@pytest.mark.parametrize("budget", [1, 6000, 2**24])
def test_modulation_ahead_equals_the_forward(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(denoiser, "MODULATION_NUMBERS", budget)
    prediction = map_prediction(known=torch.zeros(1, 15, 1, dtype=torch.bool), values=torch.zeros(1, 15, 4))
    head, times, noised = prediction.network, torch.tensor([999, 500, 250, 0]), torch.randn(1, 15, 4)
    ahead = head.at(times, prediction.condition)
    assert ahead.chunk == (0 if budget == 1 else budget // (2 * 15 * (2 * 6 + 2) * 16))
    for k in (0, 1, 2, 3, 1):  # and back
        expected = head(noised.expand(2, 1, 15, 4), times[k].expand(2, 1, 1), prediction.condition)
        assert torch.allclose(ahead(noised, k), expected, atol=1e-5)


def test_positions_have_the_column_in_the_first_half() -> None:
    table = position_table((3, 5), 8).view(3, 5, 8)
    assert (table[0, :, :4] == table[2, :, :4]).all() and (table[:, 0, 4:] == table[:, 4, 4:]).all()
    assert torch.allclose(table[1, 2, :4], torch.tensor([2.0, 0.02]).repeat(2).sin().where(
        torch.tensor([True, True, False, False]), torch.tensor([2.0, 0.02]).repeat(2).cos()), atol=1e-6)


def test_masked_tokens_are_not_seen(model: HiMAR) -> None:
    tokens, visible, vectors = torch.randn(1, 15, 4), torch.tensor([[2, 4, 9]]), model.class_vectors(labels(1))
    rows = model.pivot_rows(torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool))
    changed = tokens.clone()
    changed[0, 5] += 1
    assert torch.equal(*(model.hidden_map(rows, x, visible, vectors) for x in (tokens, changed)))
    changed[0, 4] += 1
    assert not torch.allclose(*(model.hidden_map(rows, x, visible, vectors) for x in (tokens, changed)))


def test_official_names_and_back(model: HiMAR) -> None:
    key_map = model.key_maps()["himar"]
    official = key_map.to_official(model.state_dict())
    assert {"encoder_blocks.0.adaLN_scale", "cond_z_proj.bias", "encoder_blocks_ada.1.weight",
            "decoder_task_emb.weight", "cond_diffloss.net.c_pos_embed",
            "diffloss.net.final_layer.linear.bias"} <= set(official)
    assert official["mask_token"].shape == (1, 42, 16)
    assert official["decoder_blocks.1.adaLN_shift"].shape == (2, 1, 1, 64)
    assert torch.equal(official["mask_token"][0, 21:], model.backbone.mask_token[1])
    again = key_map.to_official(key_map.to_ours(official))
    assert set(again) == set(official) and all(torch.equal(again[name], official[name]) for name in official)


@pytest.mark.parametrize(("size", "millions", "head", "map_head"), [
    ("b", 244.47, 35.7, 29.7), ("l", 529.23, 72.2, 39.3), ("h", 1090.57, 151.2, 130.5)])
def test_published_sizes(size: str, millions: float, head: float, map_head: float) -> None:
    with torch.device("meta"):
        model = build_config(compose_config("sample", [f"generator=himar_{size}", "checkpoint=none"]).generator)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters()) / 1e6  # noqa: E731
    assert round(count(model), 2) == millions
    assert (round(count(model.pivot_head), 1), round(count(model.dense_head), 1)) == (head, map_head)


def batch_of(count: int, **more: Any) -> Batch:
    extras = {"pivots": torch.randn(count, 6, 4)}
    return Batch(tokens=torch.randn(count, 15, 4), condition=labels(*range(count)), **{"extras": extras} | more)


def grads(model: HiMAR, progress: float) -> dict[str, bool]:
    """Which parameters some training steps reach."""
    for iteration in range(4):
        model.loss(batch_of(4), Draws(0, range(4)).keyed(iteration=iteration), progress).total.backward()
    return {name: bool((parameter.grad is not None) and parameter.grad.abs().max() > 0)
            for name, parameter in model.named_parameters()}


def test_every_parameter_is_trained() -> None:
    reached = grads(filled(pivot_keep=0.5, class_drop=0.5), 1.0)
    assert all(reached.values()), [name for name in reached if not reached[name]]


def test_pivots_are_nulls_at_first_and_hand_no_gradient_back() -> None:
    assert not grads(filled(pivot_keep=1.0), 0.0)["hidden_embed.weight"]
    reached = grads(filled(pivot_keep=1.0, pivot_weight=0.0), 1.0)
    assert reached["hidden_embed.weight"] and not reached["pivot_head.input.weight"]
    assert not reached["pivot_head.final.linear.bias"]
    model = filled(pivot_keep=1.0, pivot_weight=0.0)
    model.loss(batch_of(4), Draws(0, range(4)), 1.0).total.backward()
    assert (model.backbone.decoder_positions.grad[0] == 0).all()  # of the pivot phase
    assert (model.backbone.decoder_positions.grad[1] != 0).any()


def test_sample_weights_weigh_both_losses() -> None:
    model, batch, draws = filled(), batch_of(3), Draws(0, (0, 1, 2))
    weighted = lambda *weights: model.loss(  # noqa: E731
        Batch(tokens=batch.tokens, condition=batch.condition, extras=batch.extras, weights=torch.tensor(weights)),
        draws, 0.5).total
    plain = model.loss(batch, draws, 0.5)
    assert torch.allclose(plain.total, weighted(2.0, 2.0, 2.0))
    assert torch.allclose(plain.total, (weighted(1.0, 0, 0) + weighted(0, 1.0, 0) + weighted(0, 0, 1.0)) / 3)
    assert torch.allclose(plain.total, 0.4 * plain.parts["pivot"] + 0.6 * plain.parts["dense"])


@pytest.mark.parametrize(("extras", "message"), [
    ({}, r"trains on pivots \[2, 6, 4\] beside the tokens, got None"),
    ({"pivots": torch.zeros(2, 4, 4)}, r"pivots \[2, 6, 4\] .* got \[2, 4, 4\]")])
def test_training_without_pivots_is_refused(extras: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().loss(batch_of(2, extras=extras), Draws(0, (0, 1)), 0.0)


def test_heads_and_vectors_do_not_decay() -> None:
    model = build()
    decayed = {name for name, parameter in model.named_parameters() if model.decays(name, parameter)}
    assert {"backbone.mask_token", "backbone.encoder_blocks.0.phase_scale", "null_pivots"} <= decayed
    assert not any("head." in name or name.endswith(("bias", "norm.weight")) for name in decayed)


def test_overfits_a_constant() -> None:
    model = build(head_width=32, map_head_width=32)
    batch = Batch(tokens=torch.full((8, 15, 4), 0.5), condition=labels(0, 1, 2, 3, 4, 5, 0, 1),
                  extras={"pivots": torch.full((8, 6, 4), -0.5)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for iteration in range(60):
        losses = model.loss(batch, Draws(0, range(8)).keyed(iteration=iteration), iteration / 60)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values.append(losses.parts["dense"].item())
    assert sum(values[-15:]) < 0.6 * sum(values[:15])


def test_a_run_from_images_to_samples(tmp_path: Path) -> None:
    node = OmegaConf.to_container(compose_config("train", ["experiment=smoke_kl"]).tokenizer, resolve=True)
    save_weights(tmp_path / "kl.safetensors", build_config(node).state_dict(), {"tokenizer": node})
    settings = ["experiment=smoke_himar", f"run_dir={tmp_path / 'run'}", "posterior=true", "steps=3",
                f"tokenizer_checkpoint={tmp_path / 'kl.safetensors'}", "samples_every=0", "validate_every=3",
                "sampler.draw.pivot.steps=3", "sampler.draw.dense.steps=3", "sampler.plan.pivot.steps=2"]
    folder = train(compose_config("train", settings))
    model = load(folder)
    images, counts = guided(model, 2.0).sample([3, 7], seed=1)
    assert images.shape == (2, 3, 16, 16) and counts.steps == 2 + 4 and counts.head_evaluations == 2 * 3 + 4 * 3
    checkpoint, tokenizer = register_run(folder)
    config = compose_config("sample", ["model=run", f"checkpoint={checkpoint}", f"tokenizer_checkpoint={tokenizer}",
                                       "labels=[3]", "per_class=1", "guidance=2", f"out={tmp_path / 'grid.png'}"])
    assert draw_images(config).is_file()
    assert config.sampler.guidance.pivot.scale == config.sampler.guidance.dense.scale == 2
