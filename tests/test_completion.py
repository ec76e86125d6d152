"""Completing a grid of which some tokens are given, by every kind of causal generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import test_elm, test_llamagen, test_nar, test_rqvae
from varzoo.core.draws import Draws
from varzoo.core.steps import Constant
from varzoo.generators.base import Condition
from varzoo.generators.causal import CausalGenerator, Completion
from varzoo.samplers import Autoregressive

MAKERS = {
    "llamagen": (test_llamagen.tiny, test_llamagen.condition_of),
    "llamagen text": (lambda: test_llamagen.tiny(text=True), test_llamagen.condition_of),
    "nar text": (lambda: test_nar.tiny(text=True), test_nar.condition_of),
    "rq": (test_rqvae.small_generator, test_rqvae.condition_of),
    "rq text": (lambda: test_rqvae.small_generator(text=True), test_rqvae.condition_of),
    "elm": (test_elm.tiny, lambda model, size: Condition.classes(torch.arange(size))),
}


def given(model: CausalGenerator, size: int) -> tuple[Tensor, Tensor]:
    spec, generator = model.spec, torch.Generator().manual_seed(8)
    ids = (spec.length,) if spec.depth == 1 else (spec.length, spec.depth)
    tokens = torch.randint(spec.size, (size, *ids), generator=generator)
    return tokens, torch.rand(size, spec.length, generator=generator).argsort(dim=1) < spec.length // 2


def draw(model: CausalGenerator, condition: Condition, plan: Completion | None, guidance: float = 1.0) -> Tensor:
    sampler = Autoregressive(plan=plan, guidance=Constant(guidance) if guidance != 1 else None)
    return sampler.sample(model, condition, Draws(5, range(condition.size))).tokens


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("alike", [True, False])
def test_what_is_given_is_kept_and_seen_when_its_turn_comes(name: str, alike: bool) -> None:
    make, condition_of = MAKERS[name]
    model = make()
    condition, (tokens, known) = condition_of(model, 3), given(model, 3)
    known = known[:1].expand(3, -1) if alike else known
    assert known.any() and not known.all()
    draws = Draws(5, range(3))
    decoding = model.begin(condition, draws=draws, plan=Completion(tokens, known[0] if alike else known))
    drawn = torch.zeros_like(known)
    for step in decoding.steps:
        assert not known.gather(1, step.positions).all()
        prediction = decoding.predict(step)
        if name.startswith("rq"):
            expected = model._contexts(decoding.tokens, condition, None)[0][:, step.positions[0]]
            found, again = prediction.context, decoding.predict(step).context
        else:
            # Positions not drawn yet are zeros, or given though their turn has not come: unseen either way.
            expected = model.logits(decoding.tokens, condition)[:, step.positions[0]]
            found, again = prediction.logits, decoding.predict(step).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(found, again)  # predicting changes nothing
        decoding.commit(step, prediction.draw(draws).tokens)
        drawn = drawn.scatter(1, step.positions, True)
    assert (drawn | known).all() and torch.equal(decoding.tokens[known], tokens[known])


@pytest.mark.parametrize("name", MAKERS)
def test_completing_what_was_drawn_gives_it_again(name: str) -> None:
    make, condition_of = MAKERS[name]
    model = make()
    condition = condition_of(model, 2)
    whole = draw(model, condition, None)
    first = torch.zeros(model.spec.length, dtype=torch.bool)
    count, cells = model.spec.length // 2, model.order.positions.flatten()
    first[cells[:count]] = True
    assert torch.equal(draw(model, condition, Completion(whole, first)), whole)
    nothing = torch.zeros_like(first)
    assert torch.equal(draw(model, condition, Completion(whole, nothing)), whole)
    other = draw(model, condition, Completion((whole + 1) % model.spec.size, first))
    assert torch.equal(other[:, first], (whole[:, first] + 1) % model.spec.size)
    assert not torch.equal(other[:, ~first], whole[:, ~first])


def test_guided_completion_and_one_row_for_all() -> None:
    model = test_llamagen.tiny()
    condition, (tokens, known) = Condition.classes(torch.arange(3)), given(model, 1)
    together = draw(model, condition, Completion(tokens, known), guidance=2.5)
    assert torch.equal(together, draw(model, condition, Completion(tokens.expand(3, -1), known[0]), guidance=2.5))
    alone = Autoregressive(plan=Completion(tokens, known), guidance=Constant(2.5)).sample(
        model, Condition.classes(torch.tensor([2])), Draws(5, (2,))).tokens
    assert torch.equal(alone, together[2:])
    assert not torch.equal(together, draw(model, condition, Completion(tokens, known)))


def test_bad_input_is_refused() -> None:
    model, condition = test_rqvae.small_generator(), Condition.classes(torch.tensor([1, 2]))
    tokens, known = given(model, 2)

    def refused(message: str, plan: Completion) -> None:
        with pytest.raises(ValueError, match=message):
            model.begin(condition, draws=Draws(0, (0, 1)), plan=plan)

    refused(r"needs tokens \[B, 6, 3\] and a boolean mask \[B, 6\], got \[2, 6\] and torch.bool \[2, 6\]",
            Completion(tokens[..., 0], known))
    refused(r"a boolean mask \[B, 6\], got .* torch.float32 \[2, 6\]", Completion(tokens, known.float()))
    refused("given for every sample or once for all; for 2 samples", Completion(tokens.repeat(2, 1, 1), known[0]))
    refused("all tokens are given, so there is nothing to draw", Completion(tokens, torch.ones(6, dtype=torch.bool)))
    refused("given ids must lie in 0 to 11, got 0 to 13", Completion(torch.full_like(tokens, 13), known))
    refused("so it takes no plan, got 3", 3)
