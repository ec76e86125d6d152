"""The diffusion process, its solvers, the head and its prediction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from varzoo.core.draws import Draws
from varzoo.nn import denoiser
from varzoo.nn.diffusion import Diffusion, hybrid_loss, spaced_timesteps
from varzoo.nn.diffusion_mlp import DiffusionMLP
from varzoo.nn.solvers import DDIM, DDPM, DPM, Estimate, Solver
from varzoo.predictions.diffusion import DiffusionPrediction

MEAN, STD = 0.7, 0.4  # of the data in the tests with a known epsilon


def perturbed_head(*, channels: int = 3, condition_width: int = 5) -> DiffusionMLP:
    """A small head that is not zero, as it would be when new."""
    head = DiffusionMLP(channels=channels, out_channels=2 * channels, condition_width=condition_width, width=16,
                        depth=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def prediction(*, branches: int, scale: float, batch: int = 2, count: int = 3) -> DiffusionPrediction:
    return DiffusionPrediction(
        condition=torch.randn(branches, batch, count, 5), scale=scale, process=Diffusion.named("cosine", 1000),
        positions=torch.arange(count).expand(batch, -1), network=perturbed_head())


def exact_network(process: Diffusion, v: float) -> object:
    """The epsilon of N(MEAN, STD^2) data, known in closed form, as a solver's network."""
    abar = torch.from_numpy(process.alphas_cumprod)

    def network_at(times: Tensor) -> Estimate:
        def estimate(noised: Tensor, k: int) -> tuple[Tensor, Tensor]:
            share = abar[times[k].round().long()]  # DPM asks between the timesteps
            epsilon = (1 - share).sqrt() * (noised - share.sqrt() * MEAN) / (share * STD**2 + 1 - share)
            return epsilon, torch.full_like(noised, v)
        return estimate
    return network_at


def solve_gaussian(solver: Solver, steps: int | str, *, temperature: float = 1.0, v: float = -1.0) -> Tensor:
    draws = Draws(3, tuple(range(20000)))
    process = Diffusion.named("cosine", 1000)
    return solver.solve(exact_network(process, v), process, draws.normal("init_noise", dtype=torch.float64)[:, None],
                        lambda k: draws.normal("step_noise", dtype=torch.float64, k=k)[:, None],
                        steps=steps, temperature=temperature).sample


@pytest.mark.parametrize("solver, steps, v", [(DDPM(), 250, 1.0), (DDPM(), "ddim250", 0.0), (DDIM(), 100, 0.0),
                                              (DDIM(), "ddim50", 0.0), (DDIM(strided=True), 50, 0.0),
                                              (DPM(clip=990), 100, 0.0)])
def test_solvers_give_the_moments_of_the_data(solver: Solver, steps: int | str, v: float) -> None:
    samples = solve_gaussian(solver, steps, v=v)
    assert abs(samples.mean() - MEAN) < 5 * STD / math.sqrt(len(samples))
    assert abs(samples.std() / STD - 1) < 0.04


def test_temperature_narrows_what_ddpm_draws() -> None:
    cool, warm = (solve_gaussian(DDPM(), 50, temperature=temperature).std() for temperature in (0.5, 1.0))
    assert cool < 0.8 * warm


@pytest.mark.parametrize("solver", [DDIM(), DPM()])
def test_solvers_without_noise_refuse_a_temperature(solver: Solver) -> None:
    with pytest.raises(ValueError, match=rf"{type(solver).__name__} .*temperature 0\.9.*DDPM"):
        solve_gaussian(solver, 10, temperature=0.9)


@pytest.mark.parametrize("steps", [0, -2, "10", 2.5])
def test_dpm_takes_whole_steps(steps: object) -> None:
    with pytest.raises(ValueError, match="whole number of steps, at least 1, got"):
        solve_gaussian(DPM(), steps)


def test_strided_steps_are_those_of_the_string() -> None:
    process = Diffusion.named("cosine", 1000)
    assert DDIM(strided=True).respaced(process, 50) is DDIM().respaced(process, "ddim50")
    assert spaced_timesteps("ddim30", 1000) == tuple(range(0, 30 * 34, 34))[:30]


def test_noising_and_predicting_clean_are_inverse() -> None:
    process = Diffusion.named("linear", 100)
    clean, noise, index = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 10, 50, 70, 99])
    noised = process.noised(clean, index, noise)
    assert torch.allclose(process.predict_clean(noised, index, noise), clean, atol=1e-5)


def test_respacing_keeps_the_noise_levels_and_is_kept() -> None:
    process = Diffusion.named("cosine", 1000)
    timesteps = spaced_timesteps("3,10,0,7", 1000)
    short = process.respaced(timesteps)
    assert tuple(short.timesteps) == timesteps
    assert abs(short.alphas_cumprod - process.alphas_cumprod[list(timesteps)]).max() < 1e-12
    assert process.respaced(timesteps) is short
    assert short.respaced([1, 4]).timesteps.tolist() == [timesteps[1], timesteps[4]]


@pytest.mark.parametrize("steps", ["0", "1001", "ddim1001", "many", "600,400,1", "-3,9", 0, 2.5])
def test_impossible_spacings_are_refused(steps: object) -> None:
    with pytest.raises(ValueError, match=r"cannot space .* over 1000 timesteps"):
        spaced_timesteps(steps, 1000)


def test_unknown_noise_schedule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        Diffusion.named("cosin", 1000)


def test_the_bound_trains_the_variance_alone() -> None:
    process, output = Diffusion.named("cosine", 1000), torch.randn(6, 4, requires_grad=True)
    _, bound = hybrid_loss(process, lambda x, t: output, torch.randn(6, 2), torch.tensor([0, 1, 9, 99, 500, 999]),
                           torch.randn(6, 2))
    bound.sum().backward()
    assert (output.grad[:, :2] == 0).all() and (output.grad[:, 2:] != 0).any(dim=1).all()


def test_the_bound_is_least_where_the_model_is_the_posterior() -> None:
    process, noise, index = Diffusion.named("cosine", 1000), torch.randn(64, 2), torch.full((64,), 300)
    def bound(error: float, v: float) -> Tensor:
        output = torch.cat([noise + error, torch.full_like(noise, v)], dim=-1)
        return hybrid_loss(process, lambda x, t: output, torch.randn(64, 2), index, noise)[1].mean()
    assert bound(0.0, -1.0).abs() < 1e-6
    assert bound(0.0, 1.0) > 0 and bound(0.5, -1.0) > 1e-3


@pytest.mark.parametrize("budget", [1, 1500, 2**24])
def test_modulation_ahead_equals_the_forward(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(denoiser, "MODULATION_NUMBERS", budget)
    head, times = perturbed_head(), torch.tensor([999, 500, 250, 10, 0])
    condition, noised = torch.randn(2, 4, 5), torch.randn(4, 3)
    ahead = head.at(times, condition)
    for k in (0, 1, 2, 3, 4, 1):  # and back
        expected = head(noised.expand(2, 4, 3), times[k].expand(2, 4), condition)
        assert torch.allclose(ahead(noised, k), expected, atol=1e-6)


def test_a_new_head_is_zero_and_learns() -> None:
    head = DiffusionMLP(channels=3, out_channels=6, condition_width=5, width=16, depth=2)
    output = head(torch.randn(4, 3), torch.arange(4), torch.randn(4, 5))
    assert (output == 0).all()
    (output - 1).square().sum().backward()
    assert head.final.linear.bias.grad.abs().min() > 0


def test_guidance_extrapolates_epsilon_and_keeps_the_conditional_variance() -> None:
    guided = prediction(branches=2, scale=2.5)
    times, noised = torch.tensor([700]), torch.randn(2, 3, 3)
    epsilon, v = guided.estimate_at(times)(noised, 0)
    (epsilon1, v1), (epsilon0, _) = (
        guided.network(noised, times.expand(2, 3), branch).chunk(2, dim=-1) for branch in guided.condition)
    assert torch.allclose(epsilon, epsilon0 + 2.5 * (epsilon1 - epsilon0), atol=1e-5)
    assert torch.allclose(v, v1, atol=1e-6)


def test_a_guided_evaluation_counts_once_and_a_repeated_draw_is_the_same() -> None:
    guided, draws = prediction(branches=2, scale=1.5), Draws(0, (4, 9))
    drawn = guided.draw(draws, steps=7)
    assert drawn.evaluations == 7 and drawn.tokens.shape == (2, 3, 3)
    assert torch.equal(drawn.tokens, guided.draw(draws, steps="7").tokens)
    assert not torch.equal(drawn.tokens, guided.draw(Draws(1, (4, 9)), steps=7).tokens)


def test_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        prediction(branches=1, scale=1.0).draw(Draws(0, (0, 1)), temperature=-1)


def test_a_clipped_solver_begins_earlier() -> None:
    """The step counts are those of DiSA's samplers (arXiv 2505.20297), which clip at 950."""
    process = Diffusion.named("cosine", 1000)
    assert list(DDPM(clip=950).respaced(process, 5).timesteps) == [0, 250, 500, 749, 950]
    assert [len(DDPM(clip=950).respaced(process, steps)) for steps in (100, 50, 25, 10)] == [96, 48, 24, 10]
    assert len(DDPM().respaced(process, 50)) == 50
