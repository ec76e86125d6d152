from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adapters.elm import bae_of, build
from tests.golden_case import load_case
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, Rise, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix
from varzoo.generators.elm import ELM, MaskedELM
from varzoo.generators.masked import ConfidencePlan
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.binary import BinaryTokenizer, pack_bits, unpack_bits

GOLDENS = Path(__file__).parent / "goldens" / "elm"
HEIGHT, WIDTH = 2, 3  # not a square
KINDS = [(ELM, 1), (ELM, 2), (MaskedELM, 1), (MaskedELM, 2)]


def tiny(kind: type = ELM, groups: int = 2) -> ELM | MaskedELM:
    torch.manual_seed(1)
    settings = {"mask_steps": 4, "smoothing": 0.1} if kind is MaskedELM else {}
    model = kind(spec=TokenSpec(kind="discrete", shape=(HEIGHT, WIDTH), size=8, depth=groups),
                 conditioner=ClassPrefix(num_classes=5, width=32, drop=0.1), width=32, depth=2, heads=2, multiple_of=16,
                 norm_eps=1e-5, token_dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw(model: ELM | MaskedELM, labels: list[int], samples: tuple[int, ...], guidance: Schedule | None = None,
         plan: ConfidencePlan | None = None) -> Tensor:
    if isinstance(model, MaskedELM):
        plan = plan or ConfidencePlan(steps=4, noise=1.0)
    sampler = Autoregressive(guidance=guidance, plan=plan)
    return sampler.sample(model, Condition.classes(torch.tensor(labels)), Draws(5, samples)).tokens


def small_tokenizer(**options: object) -> BinaryTokenizer:
    config = {"image_size": [4, 6], "width": 32, "multipliers": [1, 1], "blocks_per_level": 1,
              "decoder_blocks_per_level": 1, "attention_levels": [1], "channels": 32, "bits": 6, "groups": 2,
              "input_norm": True, "deterministic": False, "undecided": 0.5, "uint8_rule": "round"}
    return BinaryTokenizer(**(config | options))


@pytest.mark.parametrize(("kind", "groups"), KINDS)
def test_an_image_does_not_depend_on_its_batch(kind: type, groups: int) -> None:
    model, labels = tiny(kind, groups), [0, 1, 2, 3, 4, 0]
    together = draw(model, labels, tuple(range(6)), Rise(2.0))
    assert together.shape == ((6, 6) if groups == 1 else (6, 6, 2)) and together.max() < 8
    assert torch.equal(draw(model, [3, 0, 2], (3, 5, 2), Rise(2.0)), together[[3, 5, 2]])
    assert torch.equal(draw(model, [4], (4,), Rise(2.0)), together[4:5])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 6
    assert torch.equal(draw(model, labels, tuple(range(6)), Constant(1.0)), draw(model, labels, tuple(range(6))))


@pytest.mark.parametrize("groups", [1, 2])
def test_cached_equals_uncached(groups: int) -> None:
    model, draws, condition = tiny(ELM, groups), Draws(0, range(2)), Condition.classes(torch.tensor([1, 3]))
    decoding = model.begin(condition, draws=draws, guidance=Rise(3.0, "square"))
    for step in decoding.steps:
        prediction = decoding.predict(step)
        conditional, null = (model.logits(decoding.tokens, each)[:, step.index]
                             for each in (condition, model.conditioner.null(condition)))
        expected = null + Rise(3.0, "square")(step) * (conditional - null)
        torch.testing.assert_close(prediction.logits[:, 0], expected, atol=2e-5, rtol=1e-4)
        decoding.commit(step, prediction.draw(draws).tokens)


def test_ids_of_a_position_are_drawn_independently_and_alike() -> None:
    model, count = tiny(), 4000
    decoding = model.begin(Condition.classes(torch.zeros(count, dtype=torch.long)), draws=Draws(0, range(count)))
    prediction = decoding.predict(next(decoding.steps))
    drawn, expected = prediction.draw(Draws(3, range(count))).tokens[:, 0], prediction.logits[0, 0].softmax(-1)
    joint = (drawn[:, 0] * 8 + drawn[:, 1]).bincount(minlength=64) / count
    torch.testing.assert_close(joint, torch.outer(*expected).flatten(), atol=0.03, rtol=0)


def test_masked_decoding_keeps_what_it_is_surest_of() -> None:
    model, draws = tiny(MaskedELM), Draws(0, range(3))
    decoding = model.begin(Condition.classes(torch.arange(3)), draws=draws, plan=ConfidencePlan(steps=3))
    left, before = [], None
    for step in decoding.steps:
        prediction = decoding.predict(step)
        torch.testing.assert_close(prediction.logits, decoding.predict(step).logits, atol=0, rtol=0)
        if before is not None:
            known = torch.ones(3, 6, dtype=torch.bool).scatter(1, step.positions, False)
            assert torch.equal(decoding.tokens[known], before[known])
        tokens = prediction.draw(draws).tokens
        sureness = prediction.logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].mean(-1)
        decoding.commit(step, tokens, prediction.carry)
        before = decoding.tokens.clone()
        left.append(step.left)
        masked = decoding._masked.gather(1, step.positions)
        assert (masked.sum(1) == step.left).all()
        for row in range(3 if step.left else 0):
            assert sureness[row][masked[row]].max() <= sureness[row][~masked[row]].min()
    assert left == [5, 3, 0]


def test_masked_logits_do_not_see_masked_tokens_and_see_all_others() -> None:
    model, condition = tiny(MaskedELM), Condition.classes(torch.tensor([2]))
    tokens, masked = torch.randint(8, (1, 6, 2)), torch.tensor([[True, False, True, False, False, True]])
    logits = model.logits(tokens, masked, condition)
    other = (tokens + 1) % 8
    assert torch.equal(model.logits(torch.where(masked[..., None], other, tokens), masked, condition), logits)
    last = tokens.clone()
    last[0, 4, 1] = other[0, 4, 1]
    assert (model.logits(last, masked, condition) != logits).any(-1)[0, 0].all()  # the first sees a later one


@pytest.mark.parametrize(("kind", "groups"), KINDS)
def test_losses_have_gradients_and_weights(kind: type, groups: int) -> None:
    model, draws, condition = tiny(kind, groups), Draws(0, (0, 1)), Condition.classes(torch.tensor([1, 2]))
    tokens = torch.randint(8, (2, 6) if groups == 1 else (2, 6, 2))
    model.loss(Batch(tokens=tokens, condition=condition), draws, 0.0).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    weighted = model.loss(Batch(tokens=tokens, condition=condition, weights=torch.tensor([0.0, 1.0])), draws, 0.0)
    alone = model.loss(Batch(tokens=tokens[1:], condition=Condition.classes(torch.tensor([2]))), draws.rows([1]), 0.0)
    torch.testing.assert_close(weighted.total, alone.total)


def test_bits_are_packed_and_drawn() -> None:
    bits = torch.randint(2, (2, 5, 6))
    for groups in (1, 2, 3):
        assert torch.equal(unpack_bits(pack_bits(bits, groups), groups, 6), bits)
    assert pack_bits(torch.tensor([[[1, 0, 0, 0, 1, 1]]]), 2).tolist() == [[[4, 3]]]
    tokenizer = small_tokenizer().eval()
    probabilities = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0, 0.3]).expand(4000, 1, -1)
    drawn = unpack_bits(tokenizer.tokens(probabilities, Draws(0, range(4000))), 2, 6).float().mean((0, 1))
    torch.testing.assert_close(drawn, probabilities[0, 0], atol=0.03, rtol=0)
    images = torch.rand(3, 3, 4, 6) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (3, 6, 2) and torch.equal(tokenizer.encode(images[1:2]), tokens[1:2])
    torch.testing.assert_close(tokenizer.decode(tokens)[2:], tokenizer.decode(tokens[2:]))
    reconstructions, losses = tokenizer.reconstruction_losses(images, Draws(0, range(3)))
    (reconstructions.sum() + losses.total).backward()
    assert tokenizer.encoder.conv_in.weight.grad.any() and tokenizer.bit_vectors.grad.any()


def test_bad_input_is_refused() -> None:
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"6 bits do not split into 4 groups: choose a divisor of 6\."):
        small_tokenizer(groups=4)
    with pytest.raises(ValueError, match=r"expected ids \[B, 6, 2\]"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="ids must lie in 0 to 7; got 8 to 8"):
        tokenizer.decode(torch.full((1, 6, 2), 8))
    with pytest.raises(ValueError, match="unknown law of guidance 'cosine'"):
        Rise(2.0, "cosine")
    with pytest.raises(ValueError, match=r"MaskedELM leaves the number of steps open: give plan=ConfidencePlan"):
        Autoregressive().sample(tiny(MaskedELM), Condition.classes(torch.tensor([1])), Draws(0, (0,)))
    with pytest.raises(ValueError, match="noise on confidences must be at least 0, got -1"):
        ConfidencePlan(steps=2, noise=-1.0)


@pytest.mark.parametrize(("name", "kind"), [("ar_forward", ELM), ("mlm_forward", MaskedELM)])
def test_official_layouts_are_bijective(name: str, kind: type) -> None:
    case = load_case(GOLDENS / name)
    settings = {"mask_steps": 10, "smoothing": 0.0} if kind is MaskedELM else {}
    model = build(kind, case.config, case.state_dict, **settings)
    back = model.key_maps()["elm"].to_official(model.state_dict())
    unused = ("proj.", "output.", "pos_embed.") if kind is MaskedELM else ()
    official = {key: value for key, value in case.state_dict.items() if not key.startswith(unused or "-")}
    assert back.keys() == official.keys() and all(torch.equal(back[key], value) for key, value in official.items())


def test_the_autoencoders_layout_is_bijective_and_its_prefix_falls() -> None:
    case = load_case(GOLDENS / "bae")
    tokenizer = bae_of(case.config, {f"ae.{name}": value for name, value in case.state_dict.items()})
    back = tokenizer.key_maps()["elm"].to_official(tokenizer.state_dict())
    assert all(torch.equal(case.state_dict[key], value) for key, value in back.items())
    left_out = case.state_dict.keys() - back.keys()  # shortcuts that nothing uses, and an unused head
    assert all(".conv_out." in name or ".logsigma." in name for name in left_out)
