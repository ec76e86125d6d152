from __future__ import annotations

import pytest
import torch

from tests.learning import losses_while_learning
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, Linspace, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix
from varzoo.generators.dar import DAR
from varzoo.nn.rotary import line_table
from varzoo.samplers import Autoregressive

SPEC = TokenSpec(kind="discrete", shape=(12,), size=24, prefix_decodes=True)


def tiny(spec: TokenSpec = SPEC, seed: int = 1) -> DAR:
    torch.manual_seed(seed)
    model = DAR(spec=spec, conditioner=ClassPrefix(num_classes=7, width=32, drop=0.1), width=32, depth=2, heads=2,
                multiple_of=16)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # zero at initialisation: every id alike
    for block in model.stack.blocks:
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.3)
    return model.eval()


def step_at(drawn: int, total: int) -> Step:
    return Step(index=drawn, of=total, positions=torch.tensor([[drawn]]), drawn=drawn, left=total - drawn - 1,
                total=total)


def test_cached_decoding_equals_uncached_under_growing_guidance() -> None:
    model, condition, guidance = tiny(), Condition.classes(torch.tensor([1, 2, 3])), Linspace(1.0, 6.0)
    decoding = model.begin(condition, draws=Draws(0, range(3)), guidance=guidance)
    scales = torch.linspace(1.001, 6.0, 12)
    for step in decoding.steps:
        prediction = decoding.predict(step)
        known = decoding.tokens[:, :step.drawn]
        conditional, null = model(known, condition)[:, -1:], model(known, Condition.nothing(3))[:, -1:]
        expected = null + scales[step.index] * (conditional - null)
        torch.testing.assert_close(prediction.logits, expected, atol=5e-5, rtol=1e-4)
        decoding.commit(step, prediction.draw(Draws(0, range(3))).tokens)
    together = model.logits(decoding.tokens, condition)
    torch.testing.assert_close(together, model(decoding.tokens[:, :-1], condition))


def test_the_layout_of_the_tokens_does_not_matter() -> None:
    condition, draws = Condition.classes(torch.tensor([1, 2])), Draws(0, (0, 1))
    grid = TokenSpec(kind="discrete", shape=(3, 4), size=24)
    sampler = Autoregressive(guidance=Constant(2.0), draw={"temperature": 3.0})
    line, square = (sampler.sample(tiny(spec), condition, draws).tokens for spec in (SPEC, grid))
    assert torch.equal(line, square) and len(line.unique()) > 4


def test_the_class_token_is_an_ordinary_position() -> None:
    model = tiny()
    torch.testing.assert_close(model.rotary, line_table(13, 16), atol=0, rtol=0)
    # So a token attends to the class more or less, where LlamaGen's has always a zero logit: scaling the key tells.
    tokens, condition = torch.randint(24, (1, 12)), Condition.classes(torch.tensor([3]))
    before = model.logits(tokens, condition)[:, 1:]
    with torch.no_grad():
        model.stack.blocks[0].attention.qkv.weight[32:64] *= 2
    assert not torch.allclose(before, model.logits(tokens, condition)[:, 1:])


def test_a_token_depends_on_earlier_ones_only() -> None:
    model, condition = tiny(), Condition.classes(torch.tensor([3]))
    tokens = torch.randint(24, (1, 12))
    logits = model.logits(tokens, condition)
    for place in (0, 5, 11):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 24
        changed = (model.logits(other, condition) != logits).any(dim=-1)[0]
        assert changed.tolist() == [False] * (place + 1) + [True] * (11 - place)


def test_the_schedule_is_the_official_linspace() -> None:
    for first, last, total in ((1.2, 8.0, 256), (3.0, 1.5, 5), (2.0, 2.0, 3)):
        scales = [Linspace(first, last)(step_at(drawn, total)) for drawn in range(total)]
        torch.testing.assert_close(torch.tensor(scales), torch.linspace(first, last, total))
    assert Linspace(1.0, 8.0)(step_at(0, 256)) == 1.001  # officially guided, however little
    assert Linspace(4.0, 8.0)(step_at(0, 1)) == 4.0


def test_training_lowers_the_loss() -> None:
    model = tiny().train()
    batch = Batch(tokens=torch.arange(12).repeat(4, 1), condition=Condition.classes(torch.arange(4)))
    losses = losses_while_learning(model, batch, steps=30)
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_refused() -> None:
    conditioner = ClassPrefix(num_classes=2, width=8, drop=0.1)
    with pytest.raises(ValueError, match="discrete tokens of depth 1"):
        DAR(spec=TokenSpec(kind="continuous", shape=(4,), size=8), conditioner=conditioner, width=8, depth=1, heads=1)
    with pytest.raises(ValueError, match="discrete tokens of depth 1"):
        DAR(spec=TokenSpec(kind="discrete", shape=(4,), size=8, depth=2), conditioner=conditioner, width=8, depth=1,
            heads=1)
    with pytest.raises(ValueError, match=r"guidance scale 0\.5 is below 1"):
        tiny().begin(Condition.classes(torch.tensor([0])), draws=Draws(0, (0,)), guidance=Linspace(2.0, 0.5))
    with pytest.raises(ValueError, match="unknown class id 9: this generator knows 0 to 6"):
        tiny().begin(Condition.classes(torch.tensor([9])), draws=Draws(0, (0,)))


@pytest.mark.parametrize(("width", "depth", "heads", "millions"), [
    (768, 12, 12, 110.9), (1024, 24, 16, 342.9), (1280, 36, 20, 774.7), (1536, 48, 24, 1411)])
def test_published_sizes(width: int, depth: int, heads: int, millions: float) -> None:
    with torch.device("meta"):
        model = DAR(spec=TokenSpec(kind="discrete", shape=(256,), size=16384),
                    conditioner=ClassPrefix(num_classes=1000, width=width, drop=0.1), width=width, depth=depth,
                    heads=heads)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
