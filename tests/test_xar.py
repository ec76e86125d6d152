"""xAR, FlowAR, their units and their decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden_case import fill
from tests.learning import losses_while_learning
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Anneal, Constant, FirstSteps, LinearInSteps, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.flowar import FlowAR
from varzoo.generators.units import Cells, Scales, Subsamples, Unit
from varzoo.generators.unitwise import UnitGenerator
from varzoo.generators.xar import XAR
from varzoo.loading import build, compose_config
from varzoo.nn.flow import Euler, EulerMaruyama, PiecewiseGrid
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.optim import WarmupCosine

GRID = (4, 6)
SHARED = {"spec": TokenSpec(kind="continuous", shape=GRID, size=3), "num_classes": 5, "width": 24, "heads": 2,
          "encoder_depth": 1, "decoder_depth": 1, "mlp_ratio": 2.0, "class_drop": 0.1, "attention_dropout": 0.0,
          "projection_dropout": 0.0}
CELLS = Cells(size=(2, 3))
UNITS = {"cells": CELLS, "token": Cells(size=(1, 1)), "subsamples": Subsamples(stride=(2, 2)),
         "scales": Scales(sides=((1, 1), (2, 3), (4, 6))), "image": Cells(size=GRID)}


def build_xar(unit: Unit = CELLS, **changes: Any) -> XAR:
    return XAR(unit=unit, **SHARED | changes)


def build_flowar(block: str = "plain", **changes: Any) -> FlowAR:
    settings = {"scales": (1, (2, 3), (4, 6)), "head_width": 16, "head_depth": 1, "head_heads": 2, "head_block": block}
    return FlowAR(**SHARED | settings | changes)


BUILDERS: dict[str, Callable[..., UnitGenerator]] = {
    **{f"xar_{name}": partial(build_xar, unit) for name, unit in UNITS.items()},
    "flowar_plain": build_flowar, "flowar_cross": partial(build_flowar, "cross")}
EVERY = pytest.mark.parametrize("name", BUILDERS)
MAIN = pytest.mark.parametrize("name", ["xar_cells", "flowar_cross"])


def filled(name: str) -> UnitGenerator:
    """A model whose layers all matter."""
    model = BUILDERS[name]().eval()
    state = {key: torch.from_numpy(fill(key, tuple(value.shape))) for key, value in model.state_dict().items()}
    load_strictly(model, state, "the test")
    return model


def labels(*ids: int) -> Condition:
    return Condition.classes(torch.tensor(ids))


def sample(model: UnitGenerator, condition: Condition, draws: Draws, *, guidance: Schedule | None = None,
           **draw: Any) -> Tensor:
    settings = {"steps": 4, "solver": EulerMaruyama() if isinstance(model, XAR) else Euler()} | draw
    return Autoregressive(guidance=guidance, draw=settings).sample(model, condition, draws).tokens


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("grid", [GRID, (8, 12)])
def test_units_lay_the_grid_out_and_back(unit: str, grid: tuple[int, int]) -> None:
    kind = UNITS[unit] if unit != "scales" else Scales(sides=((1, 1), grid))
    layout = kind.layout(grid)
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    assert torch.equal(layout.merge(layout.split(tokens)), tokens)
    assert torch.equal(torch.tensor(layout.sizes), layout.turn.bincount())
    steps = layout.steps(2, torch.device("cpu"))
    positions = torch.cat([step.positions for step in steps], dim=1)
    assert torch.equal(positions.sort(dim=1).values, torch.arange(len(layout.positions)).expand(2, -1))
    assert all((step.positions.diff(dim=1) > 0).all() for step in steps) and steps[-1].left == 0
    assert [step.drawn for step in steps] == [start for start, _ in layout.bounds]


def test_kinds_of_units() -> None:
    grid = torch.arange(24).view(GRID)
    positions = lambda unit: [step.positions[0].tolist() for step in unit.layout(GRID).steps(1, "cpu")]  # noqa: E731
    assert positions(CELLS)[1] == grid[:2, 3:].flatten().tolist()
    assert positions(Subsamples(stride=(2, 3)))[1] == grid[::2, 1::3].flatten().tolist()
    assert positions(Cells(size=(1, 1))) == [[index] for index in range(24)]
    assert positions(Cells(size=GRID)) == [list(range(24))]
    pyramid = UNITS["scales"].layout(GRID)
    maps = torch.randn(1, 24, 2)
    halves = maps.view(2, 2, 3, 2, 2).mean(dim=(1, 3)).view(1, 6, 2)
    assert torch.allclose(pyramid.split(maps)[:, 1:7], halves, atol=1e-6)
    assert pyramid.coordinates[2].tolist() == [0, 2] and pyramid.coordinates[4].tolist() == [2, 0]


@EVERY
@pytest.mark.parametrize("guidance", [None, LinearInSteps(3.0)])
def test_an_image_does_not_depend_on_its_batch(name: str, guidance: Schedule | None) -> None:
    model = filled(name)
    together = sample(model, labels(0, 1, 2, 3), Draws(7, (0, 1, 2, 3)), guidance=guidance)
    alone = sample(model, labels(2), Draws(7, (2,)), guidance=guidance)
    others = sample(model, labels(3, 2), Draws(7, (90, 2)), guidance=guidance)
    assert torch.allclose(alone[0], together[2], atol=1e-3) and torch.allclose(others[1], together[2], atol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def reference_xar(model: XAR, condition: Condition, draws: Draws, guidance: Schedule, steps: int) -> Tensor:
    """The straightforward loop: no cache, both branches at every evaluation."""
    layout, null = model.layout, torch.full((condition.size,), model.num_classes)
    vectors = model.class_embed(torch.cat([condition.labels, null]))
    sequence = torch.zeros(condition.size, len(layout.positions), model.spec.size)
    for step, (start, stop) in zip(layout.steps(condition.size, torch.device("cpu")), layout.bounds):
        def velocity_at(times: Tensor, step: Any = step, at: slice = slice(start, stop)) -> Any:
            def velocity(x: Tensor, k: int) -> Tensor:
                fed = sequence.clone()
                fed[:, at] = x.float()
                every = torch.zeros(2 * condition.size, len(layout.sizes))
                every[:, step.index] = times[k].float()
                conditional, null = model.velocity(fed.repeat(2, 1, 1), every, vectors)[:, at].double().chunk(2)
                return null + guidance(step) * (conditional - null)
            return velocity

        size = (model.spec.size,)
        initial = draws.normal("init_noise", size, at=step.positions)
        noise = partial(draws.normal, "step_noise", size, at=step.positions, dtype=torch.float64)
        sequence[:, start:stop] = EulerMaruyama().solve(velocity_at, initial, lambda k, noise=noise: noise(k=k),
                                                        steps=steps).sample.float()
    return layout.merge(sequence)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name.startswith("xar")])
@pytest.mark.parametrize("guidance", [LinearInSteps(2.5), Constant(1.0), FirstSteps(2.0, last=0)], ids=str)
@torch.no_grad()
def test_cached_and_guided_equals_the_plain_loop(name: str, guidance: Schedule) -> None:
    model, draws = filled(name), Draws(3, (4, 5))
    expected = reference_xar(model, labels(1, 4), draws, guidance, steps=3)
    assert torch.allclose(sample(model, labels(1, 4), draws, guidance=guidance, steps=3), expected, atol=2e-3)


class Alternating(Schedule):
    """2 at even steps, 1 at odd ones."""

    def __call__(self, step: Any) -> float:
        return 2.0 - step.index % 2


@torch.no_grad()
def test_a_null_branch_that_was_idle_catches_up() -> None:
    model, draws = filled("xar_cells"), Draws(3, (4, 5))
    expected = reference_xar(model, labels(1, 4), draws, Alternating(), steps=3)
    assert torch.allclose(sample(model, labels(1, 4), draws, guidance=Alternating(), steps=3), expected, atol=2e-3)


@MAIN
def test_the_null_half_is_not_computed_where_nothing_guides(name: str) -> None:
    model, rows = filled(name), []
    model.backbone.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    sample(model, labels(1, 4), Draws(0, (0, 1)), guidance=LinearInSteps(2.0), steps=2)
    count = 2 if isinstance(model, XAR) else 1
    assert rows[:count] == [2] * count and set(rows[count:]) == {4}
    rows.clear()
    sample(model, labels(1, 4), Draws(0, (0, 1)), guidance=Constant(1.0), steps=2)
    assert set(rows) == {2}


@EVERY
def test_guided_times_limit_guidance(name: str) -> None:
    model, draws = filled(name), Draws(0, (0, 1))
    run = partial(sample, model, labels(1, 4), draws)
    plain, guided = run(), run(guidance=Constant(3.0))
    assert torch.allclose(run(guidance=Constant(3.0), guided_times=(2.0, 2.0)), plain, atol=1e-5)
    late = run(guidance=Constant(3.0), guided_times=(0.0, 0.5))
    assert not torch.allclose(late, guided, atol=1e-2) and not torch.allclose(late, plain, atol=1e-2)


@MAIN
def test_predicting_and_committing_again_changes_nothing(name: str) -> None:
    model, draws, condition = filled(name), Draws(1, (0, 1)), labels(2, 3)
    expected = sample(model, condition, draws, guidance=LinearInSteps(2.0))
    options = {"steps": 4, "solver": EulerMaruyama() if isinstance(model, XAR) else Euler()}
    with torch.no_grad():
        decoding = model.begin(condition, draws=draws, guidance=LinearInSteps(2.0))
        taken = []
        for step in decoding.steps:
            for again in [*taken, step, step]:  # earlier steps too
                prediction = decoding.predict(again)
                drawn = [prediction.draw(draws, **options).tokens for _ in range(2)]
                assert torch.allclose(*drawn, atol=1e-5)
            decoding.commit(step, drawn[0] + 1)
            decoding.commit(step, drawn[0])
            taken.append(step)
    assert torch.allclose(decoding.tokens, expected, atol=1e-4)


@MAIN
@torch.no_grad()
def test_two_decodings_at_once(name: str) -> None:
    model = filled(name)
    options = {"steps": 3, "solver": Euler()}
    requests = [(labels(0, 1), Draws(0, (0, 1)), Constant(2.0)), (labels(4), Draws(5, (9,)), None)]
    decodings = [model.begin(condition, draws=draws, guidance=guidance) for condition, draws, guidance in requests]
    for steps in zip(*(decoding.steps for decoding in decodings)):
        for step, decoding, (_, draws, _) in zip(steps, decodings, requests):
            decoding.commit(step, decoding.predict(step).draw(draws, **options).tokens)
    for decoding, (condition, draws, guidance) in zip(decodings, requests):
        assert torch.allclose(decoding.tokens, sample(model, condition, draws, guidance=guidance, **options), atol=1e-5)


@EVERY
def test_no_labels_is_the_null_class(name: str) -> None:
    model = filled(name)
    nothing = sample(model, Condition.nothing(2), Draws(0, (0, 1)))
    with torch.no_grad():
        model.class_embed.weight[3] = model.class_embed.weight[-1]
    assert torch.equal(nothing, sample(model, labels(3, 3), Draws(0, (0, 1))))


@torch.no_grad()
def test_units_see_those_before_them_only() -> None:
    model = filled("xar_cells")
    sequence, times, vectors = torch.randn(1, 24, 3), torch.rand(1, 4), model.class_embed(torch.tensor([1]))
    changed, slots = sequence.clone(), slice(*model.layout.bounds[2])
    changed[:, slots] += 1
    moved = (model.velocity(changed, times, vectors) - model.velocity(sequence, times, vectors)).abs().amax(dim=(0, 2))
    assert (moved[:slots.start] == 0).all() and (moved[slots.start:] > 1e-4).all()


def test_evaluations_are_counted() -> None:
    counts = {}
    for name, steps in {"xar_cells": 5, "flowar_plain": Anneal(9, 5, rounding="flowar")}.items():
        solver = EulerMaruyama() if name == "xar_cells" else Euler(grid=PiecewiseGrid())
        sampler = Autoregressive(guidance=Constant(2.0), draw={"steps": steps, "solver": solver})
        counts[name] = sampler.sample(filled(name), labels(1), Draws(0, (0,))).counts
    assert (counts["xar_cells"].backbone_evaluations, counts["xar_cells"].head_evaluations) == (0, 4 * 5)
    # 9, 7 and 5 steps, of which an odd number makes one evaluation less
    assert (counts["flowar_plain"].backbone_evaluations, counts["flowar_plain"].head_evaluations) == (3, 8 + 6 + 4)


class NoSynchronisation(TorchDispatchMode):
    """Fails at operations that wait for a device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name()
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "equal")), name
        return operation(*args, **kwargs or {})


@MAIN
@torch.no_grad()
def test_solver_loops_wait_for_nothing(name: str) -> None:
    model, draws = filled(name), Draws(0, (0, 1))
    decoding = model.begin(labels(1, 2), draws=draws, guidance=LinearInSteps(2.0))
    solver = EulerMaruyama() if isinstance(model, XAR) else Euler()
    entered = []

    def watched(velocity_at: Any) -> Any:
        """The loop begins with the first evaluation; times are read on the host before it."""
        def at(times: Tensor, branches: int) -> Any:
            network, mode = velocity_at(times, branches), NoSynchronisation()

            def evaluate(x: Tensor, k: int, asked: int) -> Tensor:
                if k == 0:
                    mode.__enter__()
                    entered.append(mode)
                return network(x, k, asked)

            return evaluate
        return at

    for step in decoding.steps:
        prediction = decoding.predict(step)
        object.__setattr__(prediction, "network_at", watched(prediction.network_at))
        tokens = prediction.draw(draws, steps=4, solver=solver).tokens
        entered.pop().__exit__(None, None, None)
        decoding.commit(step, tokens)
    assert not entered
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronisation():
        torch.ones(1).item()


@EVERY
def test_official_names_and_back(name: str) -> None:
    model = filled(name)
    key_map = model.key_maps()[name.split("_")[0]]
    official = key_map.to_official(model.state_dict())
    assert {"mask", "encoder_blocks.0.attn.rope.freqs", "decoder_blocks.0.ada_lin.1.weight", "z_proj_ln.weight",
            "class_emb.weight"} <= set(official)
    again = key_map.to_official(key_map.to_ours(official))
    assert set(again) == set(official) and all(torch.equal(again[key], official[key]) for key in official)
    with pytest.raises(ValueError, match="does not know: pred_ln"):
        key_map.to_ours(official | {"pred_ln": torch.zeros(1)})


def batch_of(count: int, **more: Any) -> Batch:
    return Batch(tokens=torch.randn(count, 24, 3), condition=labels(*range(count)), **more)


@EVERY
def test_loss_is_a_function_of_its_draws_and_weights(name: str) -> None:
    model, batch, draws = filled(name), batch_of(3), Draws(0, (0, 1, 2))
    first, again, other = (model.loss(batch, draws.keyed(iteration=i), 0.0).total for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    weighted = lambda *weights: model.loss(  # noqa: E731
        Batch(tokens=batch.tokens, condition=batch.condition, weights=torch.tensor(weights)), draws, 0.0).total
    plain = model.loss(batch, draws, 0.0).total
    assert torch.allclose(plain, (weighted(1.0, 0, 0) + weighted(0, 1.0, 0) + weighted(0, 0, 1.0)) / 3)


@MAIN
@pytest.mark.parametrize("class_drop, rows", [(0.0, {0, 1, 2}), (1.0, {5})])
def test_dropped_classes_train_the_null_class(name: str, class_drop: float, rows: set[int]) -> None:
    model = filled(name)
    model.class_drop = class_drop
    model.loss(batch_of(3), Draws(0, (0, 1, 2)), 0.0).total.backward()
    assert set(model.class_embed.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()) == rows


@EVERY
def test_overfits_a_constant(name: str) -> None:
    model = BUILDERS[name]()
    batch = Batch(tokens=torch.full((8, 24, 3), 0.5), condition=labels(0, 1, 2, 3, 4, 0, 1, 2))
    losses = losses_while_learning(model, batch, steps=40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@MAIN
@pytest.mark.parametrize("settings, message", [
    ({"condition": labels(0, 5)}, "unknown class id 5: this generator knows 0 to 4"),
    ({"guidance": Constant(0.5)}, r"guidance scale 0\.5 is below 1"),
    ({"guidance": "linear"}, "unknown guidance schedule 'linear'.*LinearInSteps"),
    ({"plan": 4}, "are fixed, so it takes no plan, got 4"),
])
def test_bad_requests_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    good = {"condition": labels(0, 1), "guidance": None, "plan": None} | settings
    with pytest.raises(ValueError, match=message):
        BUILDERS[name]().begin(good.pop("condition"), draws=Draws(0, (0, 1)), **good)


@pytest.mark.parametrize("build, message", [
    (lambda: build_xar(Cells(size=(3, 3))), r"cells of 3 x 3 do not divide the grid of 4 x 6 .*that do: \[1, 2, 4\]"),
    (lambda: build_xar(Subsamples(stride=(2, 4))), "strides of 2 x 4 do not divide the grid"),
    (lambda: build_xar(Cells(size=(0, 1))), r"a cell's size is \(h, w\) of at least 1 each"),
    (lambda: build_xar(Scales(sides=(1, 2))), r"scales grow and end with the grid of 4 x 6 tokens"),
    (lambda: build_flowar(scales=((2, 3), (4, 6))), r"first scale is 1 x 1, where the class stands, got \(2, 3\)"),
    (lambda: build_flowar("crossed"), "unknown block of the flow head 'crossed'. Did you mean 'cross'"),
    (lambda: build_flowar(head_heads=3), "width 16 must be a multiple of its 3 heads"),
    (lambda: build_xar(spec=TokenSpec(kind="discrete", shape=GRID, size=8)), "a grid of continuous tokens"),
    (lambda: build_xar(spec=TokenSpec(kind="continuous", shape=(24,), size=8)), "a grid of continuous tokens"),
    (lambda: build_xar(class_drop=1.5), "0 <= class_drop <= 1"),
    (lambda: build_xar(width=18), "head_dim 9 must be a multiple of 4"),
    (lambda: build_xar(heads=5), "width 24 must be a multiple of the 5 heads"),
])
def test_bad_sizes_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("draw, message", [
    ({"temperature": 0.9}, "draw option 'temperature' does not fit: XAR predicts FlowPrediction"),
    ({"steps": 1}, "at least 2, got 1"), ({"steps": 0}, "at least 2, got 0"),
    ({"guided_times": (0.5, 0.2)}, "0 <= first <= last, got 0.5 and 0.2"),
])
def test_bad_options_are_refused(draw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(filled("xar_cells"), labels(0), Draws(0, (0,)), **draw)


def test_two_solver_steps_are_enough() -> None:
    """The official loop crashes at 1 and 2."""
    assert torch.isfinite(sample(filled("xar_cells"), labels(0), Draws(0, (0,)), steps=2)).all()


def test_the_rate_is_held_before_it_falls() -> None:
    rate = WarmupCosine(warmup=100, hold=600, total=800, floor=0.025)
    assert [rate(epoch) for epoch in (50, 100, 600, 700, 800, 900)] == pytest.approx([0.5, 1, 1, 0.5125, 0.025, 0.025])
    with pytest.raises(ValueError, match="held until step 900, past the total of 800"):
        WarmupCosine(warmup=100, hold=900, total=800, floor=0.0)


def test_linear_guidance_of_a_single_step_is_its_scale() -> None:
    model = filled("xar_image")
    steps = model.layout.steps(1, torch.device("cpu"))
    assert [LinearInSteps(3.0)(step) for step in steps] == [3.0]


@pytest.mark.parametrize("name", ["xar", "flowar"])
def test_annealed_models_differ_in_their_steps_alone(name: str) -> None:
    size = "l"
    plain, annealed = (compose_config("sample", [f"model={model}", "checkpoint=none"])
                       for model in (f"{name}_{size}", f"{name}_{size}_disa"))
    assert build(annealed.sampler).draw["steps"] == Anneal(50 if name == "xar" else 25, 15, rounding=name)
    annealed.sampler.draw.steps = plain.sampler.draw.steps
    assert annealed == plain


@pytest.mark.parametrize("name, millions", [("xar_b", 172.64), ("xar_l", 608.40), ("xar_h", 1186.02),
                                            ("flowar_s", 171.72), ("flowar_l", 586.86), ("flowar_h", 1913.32)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build(compose_config("sample", [f"generator={name}", "checkpoint=none"]).generator)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@MAIN
def test_half_precision_keeps_the_state_float32(name: str) -> None:
    model = filled(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = sample(model, labels(1), Draws(0, (0,)), guidance=LinearInSteps(2.0))
    assert tokens.dtype == torch.float32 and torch.isfinite(tokens).all()
