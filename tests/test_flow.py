"""Time grids and solvers of rectified flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from varzoo.core.draws import Draws
from varzoo.nn.flow import Euler, EulerMaruyama, FlowSolver, PiecewiseGrid, ShortGrid, TimeGrid, UniformGrid, Velocity

MEAN, STD = 0.7, 0.4  # of the data


def exact_velocity(times: Tensor) -> Velocity:
    """E[noise - x_0 | x_t] of N(MEAN, STD^2) data, known in closed form."""
    def velocity(x: Tensor, k: int) -> Tensor:
        t = times[k].item()
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)
    return velocity


@pytest.mark.parametrize("solver, steps", [
    (Euler(), 100), (Euler(grid=PiecewiseGrid()), 100), (EulerMaruyama(), 400),
    (EulerMaruyama(grid=ShortGrid(last=0.01)), 400)])
def test_solvers_give_the_moments_of_the_data(solver: FlowSolver, steps: int) -> None:
    draws = Draws(3, tuple(range(20000)))
    solved = solver.solve(exact_velocity, draws.normal("init_noise")[:, None],
                          lambda k: draws.normal("step_noise", k=k)[:, None], steps=steps)
    assert solved.evaluations == steps and solved.sample.dtype == torch.float64
    assert abs(solved.sample.mean() - MEAN) < 0.02 and abs(solved.sample.std() - STD) < 0.02


def test_grids() -> None:
    assert UniformGrid()(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert ShortGrid()(2).tolist() == pytest.approx([1, 0.04, 0]) and len(ShortGrid()(5)) == 6
    assert PiecewiseGrid()(4).tolist() == pytest.approx([1, 0.3, 0.25, 0.125, 0])
    assert torch.equal(PiecewiseGrid()(5), PiecewiseGrid()(4))
    assert torch.equal(PiecewiseGrid()(50), UniformGrid()(50)) and len(PiecewiseGrid()(49)) == 49


@pytest.mark.parametrize("grid", [UniformGrid(), ShortGrid(), PiecewiseGrid()])
@pytest.mark.parametrize("steps", [2, 3, 15, 41, 50])
def test_grids_go_down_from_one_to_zero(grid: TimeGrid, steps: int) -> None:
    times = grid(steps)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all() and times.dtype == torch.float64
    assert len(times) - 1 == (2 * (steps // 2) if isinstance(grid, PiecewiseGrid) and steps != 50 else steps)


@pytest.mark.parametrize("grid, steps, message", [
    (UniformGrid(), 0, "UniformGrid takes a whole number of solver steps, at least 1, got 0"),
    (UniformGrid(), 2.5, "whole number"), (UniformGrid(), True, "whole number"),
    (ShortGrid(), 1, "ShortGrid takes a whole number of solver steps, at least 2, got 1"),
    (PiecewiseGrid(), 1, "at least 2, got 1")])
def test_too_few_steps_are_refused(grid: TimeGrid, steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(steps)


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        ShortGrid(last=1)
    with pytest.raises(ValueError, match="choose at least 2 steps, or Euler"):
        EulerMaruyama(grid=UniformGrid()).solve(exact_velocity, torch.zeros(1), torch.zeros, steps=1)


def test_euler_runs_backwards_too() -> None:
    """From data to noise and back again."""
    class Upwards(UniformGrid):
        def times(self, steps: int) -> Tensor:
            return super().times(steps).flip(0)

    data = MEAN + STD * torch.linspace(-1, 1, 5, dtype=torch.float64)
    noise = Euler(grid=Upwards()).solve(exact_velocity, data, torch.zeros, steps=2000).sample
    again = Euler().solve(exact_velocity, noise, torch.zeros, steps=2000).sample
    assert torch.allclose(again, data, atol=2e-3) and abs(noise[0] + 1) < 5e-3


def test_state_is_exact_whatever_the_network_computes_in() -> None:
    constant = Euler().solve(lambda times: lambda x, k: torch.full_like(x, 0.5).bfloat16(), torch.ones(3), torch.zeros,
                             steps=1000)
    assert torch.allclose(constant.sample, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-12)


def test_noise_is_asked_for_once_per_step_but_the_last() -> None:
    asked: list[int] = []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return torch.zeros(1)

    EulerMaruyama().solve(exact_velocity, torch.zeros(1), noise, steps=5)
    assert asked == [0, 1, 2, 3]
    Euler().solve(exact_velocity, torch.zeros(1), noise, steps=5)
    assert len(asked) == 4
