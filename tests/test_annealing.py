"""DiSA: solver steps that fall as tokens accumulate, on generators with an iterative head and on no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_dar import tiny as build_dar
from tests.test_mar import build as build_mar
from varzoo.core.draws import Draws
from varzoo.core.steps import Anneal, Constant, LinearInTokens, Step
from varzoo.generators.base import Condition
from varzoo.generators.masked import MaskPlan
from varzoo.nn.solvers import DDIM, DDPM, DPM, Solver
from varzoo.samplers import Autoregressive


def step(index: int, of: int) -> Step:
    return Step(index=index, of=of, positions=torch.zeros(1, 1), drawn=index, left=of - index - 1, total=of)


@pytest.mark.parametrize("law", ["linear", "cosine", "two_stage"])
@pytest.mark.parametrize("rounding", ["mar", "xar", "flowar"])
def test_steps_fall_from_upper_to_lower(law: str, rounding: str) -> None:
    steps = [Anneal(50, 5, law, rounding)(step(index, 64)) for index in range(64)]
    assert steps[0] == 50 and steps[-1] == 5 and steps == sorted(steps, reverse=True)
    assert all(isinstance(count, int) for count in steps)


def test_constant_means_the_lower_number_and_a_single_step_the_upper() -> None:
    assert {Anneal(50, 5, "constant")(step(index, 9)) for index in range(9)} == {5}
    assert Anneal(50, 5)(step(0, 1)) == 50


@pytest.mark.parametrize(("settings", "message"), [
    ({"upper": 5, "lower": 50}, "from upper down to lower >= 1, got 5 and 50"),
    ({"upper": 5, "lower": 0}, "lower >= 1, got 5 and 0"),
    ({"upper": 5, "lower": 5, "law": "liner"}, "unknown annealing law 'liner'. Did you mean 'linear'"),
    ({"upper": 5, "lower": 5, "rounding": "var"}, "unknown rounding 'var'"),
])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anneal(**settings)


def test_a_categorical_generator_refuses_it_with_the_reason() -> None:
    sampler = Autoregressive(draw={"steps": Anneal(50, 5)})
    with pytest.raises(ValueError, match="draw option 'steps' does not fit: DAR predicts Categorical"):
        sampler.check(build_dar())


@pytest.mark.parametrize("solver", [DDPM(clip=950), DDIM(clip=980, strided=True), DPM()])
def test_evaluations_are_those_made(solver: Solver) -> None:
    model, plan, schedule = build_mar().eval(), MaskPlan(steps=6), Anneal(20, 4)
    calls = 0
    forward = model.head.modulated

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    model.head.modulated = counted
    sampler = Autoregressive(plan=plan, draw={"steps": schedule, "solver": solver})
    counts = sampler.sample(model, Condition.classes(torch.tensor([1, 2])), Draws(0, (0, 1))).counts
    assert counts.head_evaluations == calls
    assert 6 * 4 < calls <= sum(schedule(step(index, 6)) for index in range(6))


def test_dpm_refuses_guidance() -> None:
    sampler = Autoregressive(guidance=Constant(2.0), plan=MaskPlan(steps=3), draw={"steps": 4, "solver": DPM()})
    with pytest.raises(ValueError, match="DPM draws without guidance, got scale 2: choose DDPM or DDIM"):
        sampler.sample(build_mar().eval(), Condition.classes(torch.tensor([1])), Draws(0, (0,)))


class HostReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in self.WAITING
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("solver", [DDPM(clip=950), DDIM()])
def test_the_solver_loop_never_waits_for_the_device(solver: Solver) -> None:
    model, draws = build_mar().eval(), Draws(0, (0, 1))
    decoding = model.begin(Condition.classes(torch.tensor([1, 2])), draws=draws, plan=MaskPlan(steps=3),
                           guidance=LinearInTokens(2.0))
    prediction = decoding.predict(next(iter(decoding.steps)))
    with HostReads() as reads:
        torch.tensor(1.0).item()
        assert reads.count == 1  # it does count
        prediction.draw(draws, steps=8, solver=solver)
    assert reads.count == 1
