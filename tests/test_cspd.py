"""Continuous speculative decoding: what must equal plain MAR, what must not depend on the batch, what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Anneal, Constant, LinearInTokens
from varzoo.generators.base import Condition
from varzoo.generators.mar import MAR
from varzoo.generators.masked import MaskPlan, masked_steps
from varzoo.loading import build, compose_config
from varzoo.nn.solvers import DDIM, DDPM, Density
from varzoo.samplers import Autoregressive, ContinuousSpeculative, PrefixSpeculative
from varzoo.samplers.continuous import Acceptance
from varzoo.samplers.continuous.acceptance import log_density
from varzoo.samplers.continuous.sampler import turns

PLAN = MaskPlan(steps=8)
DRAW = {"steps": 6, "solver": DDPM(clip=900)}
GUIDANCE = LinearInTokens(2.0)
CLASSES = Condition.classes(torch.tensor([1, 0, 2]))


def mar(seed: int, shape: tuple[int, int] = (4, 3), **changes: Any) -> MAR:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "spec": TokenSpec(kind="continuous", shape=shape, size=2), "num_classes": 3, "encoder_width": 16,
        "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
        "mlp_ratio": 2.0, "buffer_size": 2, "norm_eps": 1e-6, "head_width": 16, "head_depth": 1,
        "noise_schedule": "cosine", "noise_steps": 1000, "head_batch": 1, "mask_ratio_min": 0.7, "class_drop": 0.1,
        "attention_dropout": 0.0, "projection_dropout": 0.0}
    model = MAR(**options | changes).eval()
    for parameter in model.parameters():
        if not parameter.any():  # a head that begins at zero would draw the same for every condition
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def near(seed: int, spread: float = 0.01) -> MAR:
    """The target of seed 0 with other weights close by, some of whose drafts it accepts."""
    model, generator = mar(0), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return model


def sampler(kind: type = ContinuousSpeculative, **changes: Any) -> Any:
    options: dict[str, Any] = {"draft": near(1), "length": 3, "prefill": 0.1, "acceptance": Acceptance(tau=42.0),
                               "guidance": GUIDANCE, "plan": PLAN, "draw": DRAW}
    return kind(**options | changes)


def plain(model: MAR, draws: Draws | None = None, draw: dict[str, Any] = DRAW) -> Tensor:
    drawn = Autoregressive(guidance=GUIDANCE, plan=PLAN, draw=draw)
    return drawn.sample(model, CLASSES, draws or Draws(0, range(3))).tokens


@pytest.mark.parametrize(("kind", "length"), [(PrefixSpeculative, 3), (PrefixSpeculative, 20),
                                              (ContinuousSpeculative, 1)])
def test_a_draft_that_is_the_target_draws_what_the_target_would(kind: type, length: int) -> None:
    target = mar(0)
    sampled = sampler(kind, draft=copy.deepcopy(target), length=length).sample(target, CLASSES, Draws(0, range(3)))
    assert sampled.counts.acceptance_rate == 1
    torch.testing.assert_close(sampled.tokens, plain(target), rtol=1e-4, atol=1e-5)


def test_all_prefilled_is_plain_decoding() -> None:
    target = mar(0)
    sampled = sampler(prefill=0.9).sample(target, CLASSES, Draws(0, range(3)))
    assert sampled.counts.draft_evaluations == sampled.counts.tested == 0
    assert torch.equal(sampled.tokens, plain(target))


@pytest.mark.parametrize("kind", [ContinuousSpeculative, PrefixSpeculative])
def test_an_image_does_not_depend_on_its_batch(kind: type) -> None:
    target, speculative = mar(0), sampler(kind)
    together = speculative.sample(target, CLASSES, Draws(5, range(3)))
    assert 0 < together.counts.acceptance_rate < 1
    for row in (0, 2):
        alone = speculative.sample(target, CLASSES.rows([row]), Draws(5, [row]))
        torch.testing.assert_close(alone.tokens, together.tokens[row:row + 1], rtol=1e-4, atol=1e-4)


def test_rounds_of_the_batch_differ_and_those_of_the_image_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    draft, target = (Density(mean=torch.randn(4, 3, 1, generator=generator), std=torch.ones(4, 3, 1),
                             log_std_sum=torch.zeros(4, 3, 1)) for _ in range(2))
    rejected = torch.ones(4, 3, dtype=torch.bool)
    noise = [(torch.randn(4, 3, 1, generator=generator), torch.rand(4, 3, generator=generator)) for _ in range(100)]

    def drawn(until: str, rows: slice) -> Tensor:
        some = [Density(mean=of.mean[rows], std=of.std[rows], log_std_sum=of.log_std_sum[rows])
                for of in (draft, target)]
        return Acceptance(until=until).replacements(
            *some, rejected[rows], lambda k: (noise[k][0][rows], noise[k][1][rows])).tokens

    assert torch.equal(drawn("image", slice(None))[1:2], drawn("image", slice(1, 2)))
    assert not torch.equal(drawn("batch", slice(None))[:1], drawn("batch", slice(0, 1)))


@pytest.mark.parametrize("factor", ["target_over_draft", "draft_over_target"])
def test_test_and_replacement_together_draw_from_the_target(factor: str) -> None:
    """With equal spreads F is 1, and a draft drawn from q becomes one of p: speculative sampling is exact."""
    count, acceptance = 100_000, Acceptance(tau=1.0, factor=factor)
    draws = Draws(3, range(count))
    zeros = torch.zeros(count, 1, 1)
    draft, target = (Density(mean=zeros + mean, std=zeros + std, log_std_sum=zeros) for mean, std in ((0.0, 1.0),
                                                                                                      (0.8, 0.7)))
    x = draft.mean + draft.std * draws.normal("x", (1, 1))
    accepted = acceptance.log_ratio(x, draft, target).exp() > draws.uniform("u", (1,))
    replaced = acceptance.replacements(draft, target, ~accepted, lambda k: (
        draws.normal("proposal", (1, 1), round=k), draws.uniform("keep", (1,), round=k)))
    result = torch.where(accepted[..., None], x, replaced.tokens).flatten()

    assert 0.5 < accepted.double().mean() < 0.8
    normal = torch.distributions.Normal(0.8, 0.7)
    ordered = normal.cdf(result.sort().values)  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is a chance of 1 in 1000
    assert (ordered - (torch.arange(count) + 0.5) / count).abs().max() < 1.95 / count**0.5
    assert (normal.cdf(x.flatten().sort().values) - (torch.arange(count) + 0.5) / count).abs().max() > 0.1


def test_a_factor_scales_the_ratio_and_the_residual() -> None:
    x, zeros = torch.tensor([[0.3]]), torch.zeros(1, 1)
    draft = Density(mean=zeros, std=zeros + 1, log_std_sum=zeros + 0.5)
    target = Density(mean=zeros + 0.2, std=zeros + 0.8, log_std_sum=zeros - 0.2)
    p, q = log_density(x, target).exp(), log_density(x, draft).exp()
    for factor, value in (("target_over_draft", -0.7), ("draft_over_target", 0.7)):
        acceptance, f = Acceptance(tau=1.0, factor=factor), torch.tensor([value]).exp()
        torch.testing.assert_close(acceptance.log_ratio(x, draft, target).exp(), f * p / q)
        torch.testing.assert_close(acceptance.residual(x, draft, target), ((p - q / f) / p).clamp(min=0))


def test_densities_do_not_underflow() -> None:
    tiny = Density(mean=torch.zeros(1, 64), std=torch.full((1, 64), 1e-6), log_std_sum=torch.full((1, 64), -300.0))
    assert Acceptance().log_ratio(torch.zeros(1, 64), tiny, tiny).item() == 0


@pytest.mark.parametrize(("steps", "tokens", "prefill", "length"), [(8, 12, 0.1, 3), (30, 12, 0.0, 4), (5, 5, 0.5, 9),
                                                                    (12, 12, 0.2, 1)])
def test_every_draft_is_verified_once(steps: int, tokens: int, prefill: float, length: int) -> None:
    plan = list(masked_steps(MaskPlan(steps=steps), torch.arange(tokens)[None]))
    found = turns(plan, prefill=prefill, length=length)
    assert [turn.step for turn in found] == plan
    assert not found[0].drafts
    assert not any(turn.verifies for turn in found if not turn.drafts)
    assert found[-1].verifies == found[-1].drafts
    waiting = 0
    for turn in found:
        waiting = 0 if turn.verifies else waiting + turn.drafts
        assert waiting < length


def test_disa_composes_and_costs_less() -> None:
    target = mar(0)
    annealed = sampler(draw=DRAW | {"steps": Anneal(upper=6, lower=2)}).sample(target, CLASSES, Draws(0, range(3)))
    full = sampler().sample(target, CLASSES, Draws(0, range(3)))
    assert annealed.counts.head_evaluations < full.counts.head_evaluations
    assert annealed.tokens.isfinite().all()


def test_disa_with_the_target_as_draft_stays_within_its_blocks() -> None:
    """Both models denoise by the steps of the block's first step, so equal models agree to the last draft."""
    target, draw = mar(0), DRAW | {"steps": Anneal(upper=6, lower=2)}
    sampled = sampler(PrefixSpeculative, draft=copy.deepcopy(target), draw=draw).sample(target, CLASSES,
                                                                                       Draws(0, range(3)))
    assert sampled.counts.acceptance_rate == 1


def test_counts() -> None:
    target, speculative = mar(0), sampler()
    found = turns(list(masked_steps(PLAN, torch.arange(12)[None])), prefill=0.1, length=3)
    drafted = sum(turn.step.positions.shape[1] for turn in found if turn.drafts)
    counts = speculative.sample(target, CLASSES, Draws(0, range(3))).counts
    assert counts.tested == 3 * drafted
    assert 0 <= counts.accepted <= counts.tested
    assert counts.draft_evaluations == sum(turn.drafts for turn in found)
    assert counts.backbone_evaluations == sum(turn.verifies or not turn.drafts for turn in found)
    assert counts.verifications == 3 * sum(turn.verifies for turn in found)


def test_unconditional_and_unguided() -> None:
    target = mar(0)
    sampled = sampler(guidance=None).sample(target, Condition.nothing(2), Draws(0, range(2)))
    assert sampled.tokens.shape == (2, 12, 2) and sampled.tokens.isfinite().all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"draw": DRAW | {"solver": DDIM()}}, "a token drawn by DDIM has no density to judge a draft by: choose the solver "
     "DDPM"),
    ({"draw": DRAW | {"temperature": 0}}, "a token at temperature 0 has no density"),
    ({"length": 0}, "need length >= 1 and 0 <= prefill < 1, got 0 and 0.1"),
    ({"prefill": 1.0}, "got 3 and 1"),
])
def test_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler(**changes)


@pytest.mark.parametrize(("draft", "message"), [
    (lambda: mar(1, shape=(3, 4)), "draft and target differ in tokens: "),
    (lambda: mar(1, num_classes=4), "differ in number of classes: 4 and 3"),
    (lambda: mar(1, noise_schedule="linear"), "differ in noise schedule. Draft with"),
])
def test_drafts_that_do_not_fit(draft: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler(draft=draft()).check(mar(0))


@pytest.mark.parametrize("name", ["llamagen_tiny", "xar_tiny"])
def test_other_generators_are_refused_with_the_reason(name: str) -> None:
    other = build(compose_config("sample", [f"generator={name}", "checkpoint=none"]).generator)
    with pytest.raises(ValueError, match=f"needs a generator that offers densities; {type(other).__name__} does not"):
        sampler().check(other)
    with pytest.raises(ValueError, match=f"{type(other).__name__} does not, since"):
        sampler(draft=other).check(mar(0))


@pytest.mark.parametrize(("changes", "message"), [
    ({"tau": 0.0}, "need tau > 0"), ({"rounds": 0}, "rounds >= 1"), ({"factor": "none"}, "factor"),
    ({"until": "token"}, "extent of the proposals")])
def test_acceptance_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Acceptance(**changes)


def test_plain_guidance_of_both_models() -> None:
    """A constant scale guides drafts and verifications alike: the target as its own draft is accepted."""
    target = mar(0)
    sampled = sampler(PrefixSpeculative, draft=copy.deepcopy(target), guidance=Constant(3.0)).sample(
        target, CLASSES, Draws(0, range(3)))
    assert sampled.counts.acceptance_rate == 1
