from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.learning import losses_while_learning
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, FirstSteps
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.llamagen import LlamaGen
from varzoo.samplers import Autoregressive

SPEC = TokenSpec(kind="discrete", shape=(3, 5), size=24)  # not a square
TEXT_LENGTH = 4


def tiny(text: bool = False, drop: float = 0.1) -> LlamaGen:
    torch.manual_seed(1)
    conditioner = (TextPrefix(length=TEXT_LENGTH, channels=6, width=32, drop=drop) if text
                   else ClassPrefix(num_classes=7, width=32, drop=drop))
    model = LlamaGen(spec=SPEC, conditioner=conditioner, width=32, depth=2, heads=2, multiple_of=16)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # zero at initialisation: every id alike
    for block in model.stack.blocks:
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.3)
    return model.eval()


def condition_of(model: LlamaGen, size: int) -> Condition:
    if model.num_classes is not None:
        return Condition.classes(torch.arange(size) % 7)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(size, TEXT_LENGTH, 6, generator=generator)
    valid = torch.arange(TEXT_LENGTH) >= (torch.arange(size) % TEXT_LENGTH)[:, None]  # padded on the left
    return Condition.text(features * valid[..., None], valid)


def draw(model: LlamaGen, condition: Condition, samples: tuple[int, ...], **settings: object) -> Tensor:
    return Autoregressive(**settings).sample(model, condition, Draws(5, samples)).tokens


@pytest.mark.parametrize("text", [False, True])
def test_cached_decoding_equals_uncached(text: bool) -> None:
    model = tiny(text)
    condition = condition_of(model, 3)
    sampler = Autoregressive(guidance=Constant(2.0))
    decoding = model.begin(condition, draws=Draws(0, range(3)), guidance=sampler.guidance)
    for step in decoding.steps:
        prediction = decoding.predict(step)
        known = decoding.tokens[:, :step.drawn]
        conditional = model(known, condition)[:, -1:]
        null = model(known, model.conditioner.null(condition))[:, -1:]
        expected = null + 2.0 * (conditional - null)
        torch.testing.assert_close(prediction.logits, expected, atol=2e-5, rtol=1e-4)
        again = decoding.predict(step)  # predicting changes nothing
        torch.testing.assert_close(again.logits, prediction.logits, atol=0, rtol=0)
        decoding.commit(step, prediction.draw(Draws(0, range(3))).tokens)


@pytest.mark.parametrize("text", [False, True])
def test_an_image_does_not_depend_on_its_batch(text: bool) -> None:
    model = tiny(text)
    condition = condition_of(model, 8)
    together = draw(model, condition, tuple(range(8)), guidance=Constant(1.5))
    for row in (0, 5):
        alone = Condition(size=1, **{name: value[row:row + 1] for name, value in vars(condition).items()
                                     if isinstance(value, Tensor)})
        assert torch.equal(draw(model, alone, (row,), guidance=Constant(1.5))[0], together[row])
    assert len({tuple(row.tolist()) for row in together}) == 8  # and no two are the same


def test_guidance_of_one_is_no_guidance_and_intervals_end() -> None:
    model, condition = tiny(), Condition.classes(torch.tensor([1, 2]))
    plain = draw(model, condition, (0, 1))
    assert torch.equal(draw(model, condition, (0, 1), guidance=Constant(1.0)), plain)
    guided = draw(model, condition, (0, 1), guidance=Constant(4.0))
    first = draw(model, condition, (0, 1), guidance=FirstSteps(4.0, last=6))
    assert torch.equal(first[:, :7], guided[:, :7]) and not torch.equal(first, guided)


def test_two_decodings_run_at_once() -> None:
    model, draws = tiny(), Draws(3, (0, 1))
    conditions = [Condition.classes(torch.tensor([1, 2])), Condition.classes(torch.tensor([4, 5]))]
    expected = [draw(model, condition, (0, 1)) for condition in conditions]
    decodings = [model.begin(condition, draws=draws) for condition in conditions]
    for steps in zip(*(decoding.steps for decoding in decodings)):
        for decoding, step in zip(decodings, steps):
            decoding.commit(step, decoding.predict(step).draw(Draws(5, (0, 1))).tokens)
    for decoding, tokens in zip(decodings, expected):
        assert torch.equal(decoding.tokens, tokens)


def test_dropping_the_condition_is_the_null_condition() -> None:
    model, tokens = tiny(), torch.randint(24, (2, 15))
    condition = Condition.classes(torch.tensor([1, 2]))
    dropped = model(tokens, condition, torch.tensor([True, False]))
    torch.testing.assert_close(dropped[0], model(tokens, Condition.nothing(2))[0])
    torch.testing.assert_close(dropped[1], model(tokens, condition)[1])


def test_sampled_marginals_follow_the_model() -> None:
    model = tiny()
    condition = Condition.classes(torch.zeros(4000, dtype=torch.long))
    tokens = draw(model, condition, tuple(range(4000)), draw={"temperature": 0.8, "top_k": 5})
    logits = model(tokens[:1, :0], Condition.classes(torch.tensor([0])))[0, -1] / 0.8
    keep = logits.topk(5).indices
    expected = torch.zeros(24).scatter(0, keep, logits[keep].softmax(0)) * 4000
    counts = tokens[:, 0].bincount(minlength=24)
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_official_names_there_and_back() -> None:
    for model in (tiny(), tiny(text=True)):
        key_map = model.key_maps()["llamagen"]
        official = key_map.to_official(model.state_dict())
        ours = key_map.to_ours({f"_orig_mod.{name}": tensor for name, tensor in official.items()})
        assert ours.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_training_lowers_the_loss() -> None:
    model = tiny().train()
    batch = Batch(tokens=torch.arange(15).repeat(4, 1), condition=Condition.classes(torch.arange(4)))
    losses = losses_while_learning(model, batch, steps=30)
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_refused() -> None:
    model, draws = tiny(), Draws(0, (0,))
    label = Condition.classes(torch.tensor([0]))
    with pytest.raises(ValueError, match="unknown class id 7: this generator knows 0 to 6"):
        model.begin(Condition.classes(torch.tensor([7])), draws=draws)
    with pytest.raises(ValueError, match=r"guidance scale 0\.5 is below 1"):
        model.begin(label, draws=draws, guidance=Constant(0.5))
    with pytest.raises(ValueError, match="takes no plan"):
        model.begin(label, draws=draws, plan=12)
    with pytest.raises(ValueError, match="no null class"):
        tiny(drop=0).begin(label, draws=draws, guidance=Constant(2.0))
    with pytest.raises(ValueError, match="'solver' does not fit"):
        draw(model, label, (0,), draw={"solver": "ddpm"})

    class Speculative(Autoregressive):
        needs = frozenset({"foresight"})

    with pytest.raises(ValueError, match="Speculative needs a generator that offers foresight; LlamaGen does not"):
        Speculative().check(model)
    with pytest.raises(ValueError, match="text features were given"):
        model.begin(condition_of(tiny(text=True), 1), draws=draws)
    with pytest.raises(ValueError, match="discrete grids"):
        LlamaGen(spec=TokenSpec(kind="continuous", shape=(4, 4), size=8),
                 conditioner=ClassPrefix(num_classes=2, width=8, drop=0.1), width=8, depth=1, heads=1)


@pytest.mark.parametrize(("width", "depth", "heads", "millions"), [
    (768, 12, 12, 110.9), (1024, 24, 16, 342.9), (1280, 36, 20, 774.7), (1536, 48, 24, 1411), (3200, 24, 32, 3097)])
def test_published_sizes(width: int, depth: int, heads: int, millions: float) -> None:
    with torch.device("meta"):
        model = LlamaGen(spec=TokenSpec(kind="discrete", shape=(16, 16), size=16384),
                         conditioner=ClassPrefix(num_classes=1000, width=width, drop=0.1),
                         width=width, depth=depth, heads=heads)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
