from __future__ import annotations

import itertools
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor

from tests.learning import losses_while_learning
from varzoo import hub
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, FirstTokens, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.nar import NAR
from varzoo.generators.orders import Order
from varzoo.samplers import Autoregressive

HEIGHT, WIDTH = 3, 5  # not a square
SPEC = TokenSpec(kind="discrete", shape=(HEIGHT, WIDTH), size=24)
DISTANCE = torch.tensor([row + column for row in range(HEIGHT) for column in range(WIDTH)])
TEXT_LENGTH = 4


def tiny(text: bool = False) -> NAR:
    torch.manual_seed(1)
    conditioner = (TextPrefix(length=TEXT_LENGTH, channels=6, width=32, drop=0.1) if text
                   else ClassPrefix(num_classes=7, width=32, drop=0.1))
    model = NAR(spec=SPEC, conditioner=conditioner, width=32, depth=2, heads=2, multiple_of=16)
    for weight in [head.weight for head in model.heads] + [block.attention.qkv.weight for block in model.stack.blocks]:
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def condition_of(model: NAR, size: int) -> Condition:
    if model.num_classes is not None:
        return Condition.classes(torch.arange(size) % 7)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(size, TEXT_LENGTH, 6, generator=generator)
    valid = torch.arange(TEXT_LENGTH) >= (torch.arange(size) % TEXT_LENGTH)[:, None]  # padded on the left
    return Condition.text(features * valid[..., None], valid)


def draw(model: NAR, condition: Condition, samples: tuple[int, ...], **settings: object) -> Tensor:
    return Autoregressive(**settings).sample(model, condition, Draws(5, samples)).tokens


@pytest.mark.parametrize("shape", [(3, 5), (4, 1), (1, 1), (2, 3, 4), (1, 2, 2)])
def test_shells_of_any_grid(shape: tuple[int, ...]) -> None:
    order, cells = Order.shells(2, shape), list(itertools.product(*map(range, shape)))
    assert len(order.sizes) == sum(shape) - len(shape) + 1
    rank = {cells[cell]: 2 + i for i, cell in enumerate(order.cells.tolist())}
    for cell, step in zip(order.cells.tolist(), order.turn[2:].tolist()):
        assert step == 2 + sum(cells[cell])
    for turn, distance in zip(order.steps, itertools.count()):
        assert [sum(cells[position]) for position in turn.positions.tolist()] == [distance] * len(turn.positions)
        assert turn.positions.tolist() == sorted(turn.positions.tolist())
    for head, axis in enumerate(reversed(range(len(shape)))):
        for cell, source in zip(order.cells.tolist(), order.sources[head].tolist()):
            before = tuple(place - (i == axis) for i, place in enumerate(cells[cell]))
            assert source == (1 if cell == 0 else rank.get(before, -1))


@pytest.mark.parametrize("text", [False, True])
def test_cached_decoding_equals_uncached(text: bool) -> None:
    model = tiny(text)
    condition, guidance = condition_of(model, 3), FirstTokens(2.0, last=6)
    decoding = model.begin(condition, draws=Draws(0, range(3)), guidance=guidance)
    steps = 0
    for step in decoding.steps:
        prediction = decoding.predict(step)
        assert (DISTANCE[step.positions] == step.index).all()
        conditional = model.logits(decoding.tokens, condition)  # tokens not drawn yet are zeros, and unseen
        null = model.logits(decoding.tokens, model.conditioner.null(condition))
        expected = null + (2.0 if step.drawn <= 6 else 1.0) * (conditional - null)
        torch.testing.assert_close(prediction.logits, expected[:, step.positions[0]], atol=2e-5, rtol=1e-4)
        again = decoding.predict(step)  # predicting changes nothing
        torch.testing.assert_close(again.logits, prediction.logits, atol=0, rtol=0)
        decoding.commit(step, prediction.draw(Draws(0, range(3))).tokens)
        steps += 1
    assert steps == HEIGHT + WIDTH - 1


def test_a_token_depends_on_nearer_ones_only() -> None:
    model, condition = tiny(), Condition.classes(torch.tensor([3]))
    tokens = torch.randint(24, (1, HEIGHT * WIDTH))
    logits = model.logits(tokens, condition)
    for place in range(HEIGHT * WIDTH):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 24
        changed = (model.logits(other, condition) != logits).any(dim=-1)[0]
        assert torch.equal(changed, DISTANCE[place] < DISTANCE)


def test_borders_have_one_head_and_the_rest_both() -> None:
    model, condition = tiny(), Condition.classes(torch.tensor([3]))
    tokens = torch.randint(24, (1, HEIGHT * WIDTH))
    both = model.logits(tokens, condition).view(HEIGHT, WIDTH, 24)
    with torch.no_grad():
        model.heads[1].weight.zero_()
    right = model.logits(tokens, condition).view(HEIGHT, WIDTH, 24)
    torch.testing.assert_close(right[0, 1:], both[0, 1:])  # the first row has no neighbours above
    assert (right[1:, 0] == 0).all() and not torch.allclose(right[1:, 1:], both[1:, 1:])
    assert not torch.allclose(right[0, 0], both[0, 0])  # the first token is predicted by both


@pytest.mark.parametrize("text", [False, True])
def test_an_image_does_not_depend_on_its_batch(text: bool) -> None:
    model = tiny(text)
    condition = condition_of(model, 8)
    together = draw(model, condition, tuple(range(8)), guidance=Constant(1.5))
    order = torch.tensor([5, 0, 7, 2])
    some = Condition(size=4, **{name: value[order] for name, value in vars(condition).items()
                                if isinstance(value, Tensor)})
    assert torch.equal(draw(model, some, tuple(order.tolist()), guidance=Constant(1.5)), together[order])
    assert len({tuple(row.tolist()) for row in together}) == 8  # and no two are the same


def test_guidance_of_one_is_no_guidance_and_intervals_end() -> None:
    model, condition = tiny(), Condition.classes(torch.tensor([1, 2]))
    plain = draw(model, condition, (0, 1))
    assert torch.equal(draw(model, condition, (0, 1), guidance=Constant(1.0)), plain)

    def scales(schedule: Schedule) -> list[float]:
        return [schedule(step) for step in model.begin(condition, draws=Draws(0, (0, 1))).planned]

    assert scales(FirstTokens(4.0, last=3)) == [4, 4, 4, 1, 1, 1, 1]  # 0, 1 and 3 tokens were drawn before, then 6
    assert scales(FirstTokens(4.0, last=2)) == [4, 4, 1, 1, 1, 1, 1]
    guided = draw(model, condition, (0, 1), guidance=Constant(4.0))
    first = draw(model, condition, (0, 1), guidance=FirstTokens(4.0, last=3))
    assert torch.equal(first[:, DISTANCE < 3], guided[:, DISTANCE < 3]) and not torch.equal(first, guided)


def test_sampled_marginals_of_a_shell_follow_the_model() -> None:
    model, count = tiny(), 4000
    condition = Condition.classes(torch.zeros(count, dtype=torch.long))
    decoding = model.begin(condition, draws=Draws(0, range(count)))
    steps = decoding.steps
    decoding.commit(next(steps), torch.full((count, 1), 3))
    step = next(steps)
    prediction = decoding.predict(step)
    second = prediction.draw(Draws(5, range(count)), temperature=0.8, top_k=5).tokens
    for place in range(2):
        logits = prediction.logits[0, place] / 0.8
        keep = logits.topk(5).indices
        expected = torch.zeros(24).scatter(0, keep, logits[keep].softmax(0)) * count
        counts = second[:, place].bincount(minlength=24)
        assert counts[expected == 0].sum() == 0
        assert ((counts - expected)[keep] ** 2 / expected[keep]).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    # The draws of a shell are independent given what was drawn before it.
    table = torch.zeros(24, 24).index_put((second[:, 0], second[:, 1]), torch.ones(count), accumulate=True)
    rows, columns = table.sum(1) > 100, table.sum(0) > 100
    observed = table[rows][:, columns]
    expected = observed.sum(1, keepdim=True) * observed.sum(0) / observed.sum()
    freedom = (rows.sum() - 1) * (columns.sum() - 1)
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_official_names_there_and_back() -> None:
    for model in (tiny(), tiny(text=True)):
        key_map = model.key_maps()["nar"]
        official = key_map.to_official(model.state_dict())
        assert {"medusa_norm.weight", "medusa_output.weight", "layers.2.ffn_norm.weight"} < official.keys()
        ours = key_map.to_ours({f"_orig_mod.{name}": tensor for name, tensor in official.items()})
        assert ours.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_training_lowers_the_loss() -> None:
    model = tiny().train()
    batch = Batch(tokens=torch.arange(15).repeat(4, 1), condition=Condition.classes(torch.arange(4)))
    losses = losses_while_learning(model, batch, steps=30)
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_first_used_for_inference_can_be_trained() -> None:
    model = tiny()
    batch = Batch(tokens=torch.randint(24, (2, 15)), condition=Condition.classes(torch.arange(2)))
    with torch.inference_mode():
        draw(model, batch.condition, (0, 1))
        expected = model.loss(batch, Draws(0, range(2)), 0.0).total
    loss = model.loss(batch, Draws(0, range(2)), 0.0).total
    loss.backward()
    torch.testing.assert_close(loss, expected.clone())


def test_weights_of_samples_count_in_the_loss() -> None:
    model = tiny()
    tokens, labels = torch.randint(24, (3, 15)), torch.tensor([1, 2, 3])
    draws = Draws(0, range(3))
    each = [model.loss(Batch(tokens=tokens[i:i + 1], condition=Condition.classes(labels[i:i + 1])),
                       draws.rows([i]), 0.0).total for i in range(3)]
    weighted = model.loss(Batch(tokens=tokens, condition=Condition.classes(labels), weights=torch.tensor([1, 0, 3])),
                          draws, 0.0).total
    torch.testing.assert_close(weighted, (each[0] + 3 * each[2]) / 4)


def test_a_published_file_without_a_known_name_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"yefly/NAR-imagenet-256-M": ["README.md", "nar.pt"], "chenfeng1271/NAR-imagenet-256-B": ["a.pt", "b.pt"]}
    monkeypatch.setattr(huggingface_hub, "list_repo_files", files.__getitem__)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, cache_dir: f"{cache_dir}/{repo}/{file}")
    assert hub.fetch("nar_m", tmp_path) == tmp_path / "yefly/NAR-imagenet-256-M/nar.pt"
    with pytest.raises(ValueError, match=r"holds 2 \(a.pt, b.pt\)"):
        hub.fetch("nar_b", tmp_path)


def test_bad_input_is_refused() -> None:
    model, draws = tiny(), Draws(0, (0,))
    with pytest.raises(ValueError, match="unknown class id 7: this generator knows 0 to 6"):
        model.begin(Condition.classes(torch.tensor([7])), draws=draws)
    with pytest.raises(ValueError, match="takes no plan"):
        model.begin(Condition.classes(torch.tensor([0])), draws=draws, plan=12)
    with pytest.raises(ValueError, match="text features were given"):
        model.begin(condition_of(tiny(text=True), 1), draws=draws)
    with pytest.raises(ValueError, match=r"text features must be \[B, 4, 6\]"):
        tiny(text=True).begin(Condition.text(torch.zeros(1, 4, 5), torch.ones(1, 4)), draws=draws)
    for spec in (TokenSpec(kind="continuous", shape=(4, 4), size=8), TokenSpec(kind="discrete", shape=(16,), size=8)):
        with pytest.raises(ValueError, match="discrete grids"):
            NAR(spec=spec, conditioner=ClassPrefix(num_classes=2, width=8, drop=0.1), width=8, depth=1, heads=1)


@pytest.mark.parametrize(("width", "depth", "heads", "text", "millions"), [
    (768, 12, 12, False, 130.6), (1024, 18, 16, False, 295.5), (1024, 24, 16, False, 372.5),
    (1280, 36, 20, False, 816.0), (1536, 48, 24, False, 1464.5), (1280, 36, 20, True, 819.0)])
def test_published_sizes(width: int, depth: int, heads: int, text: bool, millions: float) -> None:
    with torch.device("meta"):
        conditioner = (TextPrefix(length=120, channels=2048, width=width, drop=0.1) if text
                       else ClassPrefix(num_classes=1000, width=width, drop=0.1))
        model = NAR(spec=TokenSpec(kind="discrete", shape=(2, 2), size=16384), conditioner=conditioner, width=width,
                    depth=depth, heads=heads)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
