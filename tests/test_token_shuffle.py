"""The properties that define Token-Shuffle, for which there is no official code; tables are those of the definition."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import DEFAULT_GOLDENS
from tests.learning import losses_while_learning
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, Ramp, Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import CausalGenerator
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.dar import DAR
from varzoo.generators.llama import LlamaGenerator
from varzoo.generators.llamagen import LlamaGen
from varzoo.generators.nar import NAR
from varzoo.generators.orders import Order
from varzoo.generators.token_shuffle import Shuffle, TokenShuffle, Unshuffle
from varzoo.nn.llama import Sight
from varzoo.samplers import Autoregressive

TABLES = json.loads((DEFAULT_GOLDENS / "token_shuffle" / "properties.json").read_text())
TEXT_LENGTH, CODES = 4, 24


def shake(model: torch.nn.Module) -> None:
    """Weights far from their beginning, where everything would be alike."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3 if "qkv" in name or "head" in name else 0.1)


def tiny(shape: tuple[int, int] = (4, 6), window: int = 2, blocks: int = 2, text: bool = False, z_loss: float = 0.0,
         backbone: type[LlamaGenerator] = LlamaGen) -> TokenShuffle:
    torch.manual_seed(1)
    conditioner = (TextPrefix(length=TEXT_LENGTH, channels=6, width=32, drop=0.1) if text
                   else ClassPrefix(num_classes=7, width=32, drop=0.1))
    inner = partial(backbone, conditioner=conditioner, width=32, depth=2, heads=2, multiple_of=16)
    spec = TokenSpec(kind="discrete", shape=shape, size=CODES)
    model = TokenShuffle(spec=spec, backbone=inner, window=window, blocks=blocks, z_loss=z_loss)
    shake(model)
    return model.eval()


def condition_of(model: CausalGenerator, size: int) -> Condition:
    if model.num_classes is not None:
        return Condition.classes(torch.arange(size) % 7)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(size, TEXT_LENGTH, 6, generator=generator)
    valid = torch.arange(TEXT_LENGTH) >= (torch.arange(size) % TEXT_LENGTH)[:, None]  # padded on the left
    return Condition.text(features * valid[..., None], valid)


def draw(model: CausalGenerator, condition: Condition, **settings: object) -> Tensor:
    return Autoregressive(**settings).sample(model, condition, Draws(5, range(condition.size))).tokens


def windows_of(model: TokenShuffle) -> Tensor:
    """The window of every token, in raster order."""
    window = torch.empty(model.spec.length, dtype=torch.long)
    return window.scatter(0, model.order.positions.flatten(),
                          model.order.cells.repeat_interleave(model.order.positions.shape[1]))


# 1. Index maps

@pytest.mark.parametrize("table", TABLES["index_maps"], ids=lambda table: "{H}x{W}_{s}".format(**table))
def test_windows_are_a_permutation(table: dict[str, Any]) -> None:
    height, width, side = table["H"], table["W"], table["s"]
    plain = Order.raster(1, table["fused_len"])
    positions = plain.windows((height, width), side).positions
    assert positions.shape == (table["fused_len"], side * side)
    assert positions.flatten().tolist() == table["fine_index_of_fused_order"]
    places = positions.flatten().argsort()
    assert places.div(side * side, rounding_mode="floor").tolist() == table["window_of"]
    assert places.remainder(side * side).tolist() == table["slot_of"]
    if side == 1:
        assert torch.equal(positions, plain.positions)


# 2. Round trip

def test_a_split_basis_makes_the_round_trip_a_projection() -> None:
    width, ids = 16, 4
    basis = torch.linalg.qr(torch.randn(width, width)).Q[: width // ids]
    shuffle, unshuffle = Shuffle(width=width, ids=ids, blocks=0), Unshuffle(width=width, ids=ids, blocks=0)
    with torch.no_grad():
        shuffle.compress.weight.copy_(basis)
        unshuffle.expand.weight.copy_(basis.T)
    embeddings = torch.randn(2, 3 * ids, width)
    torch.testing.assert_close(unshuffle(shuffle(embeddings)), embeddings @ basis.T @ basis)
    one = tiny(window=1, blocks=0)
    assert torch.equal(one.unshuffle[0](one.shuffle(embeddings)), embeddings)


def test_blocks_are_the_identity_at_first() -> None:
    with_blocks, without = Shuffle(width=16, ids=4, blocks=2), Shuffle(width=16, ids=4, blocks=0)
    without.compress.load_state_dict(with_blocks.compress.state_dict())
    embeddings = torch.randn(2, 8, 16)
    assert torch.equal(with_blocks(embeddings), without(embeddings))


# 3. Windows of one

@pytest.mark.parametrize("guidance", [None, Constant(3.0)])
@pytest.mark.parametrize("backbone", [LlamaGen, DAR, NAR])
def test_windows_of_one_are_the_plain_model(backbone: type[LlamaGenerator], guidance: Schedule | None) -> None:
    shuffled = tiny(window=1, blocks=0, backbone=backbone)
    plain = shuffled.backbone
    condition = condition_of(shuffled, 3)
    tokens = draw(plain, condition, guidance=guidance)
    assert torch.equal(draw(shuffled, condition, guidance=guidance), tokens)
    assert torch.equal(shuffled.logits(tokens, condition), plain.logits(tokens, condition))
    assert len(list(shuffled.parameters())) == len(list(plain.parameters()))


# 4. Causality

@pytest.mark.parametrize("table", TABLES["causality"], ids=lambda table: "{H}x{W}_{s}".format(**table))
def test_logits_depend_on_earlier_windows_only(table: dict[str, Any]) -> None:
    side = table["s"]
    torch.manual_seed(1)
    inner = partial(LlamaGen, conditioner=ClassPrefix(num_classes=7, width=72, drop=0.1), width=72, depth=2, heads=2,
                    multiple_of=16)
    model = TokenShuffle(spec=TokenSpec(kind="discrete", shape=(table["H"], table["W"]), size=CODES), backbone=inner,
                         window=side, blocks=1, z_loss=0.0).eval()
    shake(model)
    condition, tokens = Condition.classes(torch.tensor([2])), torch.randint(CODES, (1, model.spec.length))
    logits = model.logits(tokens, condition)
    depends = torch.zeros(model.spec.length, model.spec.length, dtype=torch.bool)
    for place in range(model.spec.length):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % CODES
        depends[:, place] = (model.logits(other, condition) != logits).any(dim=-1)[0]
    assert torch.equal(depends, torch.tensor(table["may_depend"], dtype=torch.bool))
    first = windows_of(model) == 0
    other_class = model.logits(tokens, Condition.classes(torch.tensor([3])))
    assert (other_class != logits).any(dim=-1)[0][first].all()


# 5. Places in a window

def test_permuting_places_permutes_logits() -> None:
    width, ids, place = 16, 4, torch.tensor([2, 0, 3, 1])
    channels = (place[:, None] * (width // ids) + torch.arange(width // ids)).flatten()
    shuffle, unshuffle = Shuffle(width=width, ids=ids, blocks=2), Unshuffle(width=width, ids=ids, blocks=2)
    shuffled, unshuffled = Shuffle(width=width, ids=ids, blocks=2), Unshuffle(width=width, ids=ids, blocks=2)
    for module, permuted in ((shuffle, shuffled), (unshuffle, unshuffled)):
        shake(module)
        permuted.load_state_dict(module.state_dict())
        with torch.no_grad():
            for block, twin in zip(module.blocks, permuted.blocks):
                twin.up.weight.copy_(block.up.weight[:, channels])
                twin.down.weight.copy_(block.down.weight[channels])
    embeddings = torch.randn(2, 3, ids, width)
    fused = shuffle(embeddings.flatten(1, 2))
    torch.testing.assert_close(shuffled(embeddings[:, :, place].flatten(1, 2)), fused[..., channels])
    features = unshuffle(fused).unflatten(1, (3, ids))
    torch.testing.assert_close(unshuffled(fused[..., channels]).unflatten(1, (3, ids)), features[:, :, place])


# 6. Counts

@pytest.mark.parametrize("table", TABLES["token_counts"], ids=lambda table: "{resolution}_{s}".format(**table))
def test_counts(table: dict[str, Any]) -> None:
    width, side = table["fused_compressed_dim"] * table["s"] ** 2, table["resolution"] // table["downsample"]
    with torch.device("meta"):
        inner = partial(LlamaGen, conditioner=ClassPrefix(num_classes=2, width=width, drop=0.1), width=width, depth=1,
                        heads=12)
        model = TokenShuffle(spec=TokenSpec(kind="discrete", shape=(side, side), size=8), backbone=inner,
                             window=table["s"], blocks=2, z_loss=0.0)
        assert model.spec.length == table["fine_tokens"]
        assert len(model.order.steps) == len(model.order.cells) == table["fused_tokens"]
        assert model.shuffle.compress.out_features == table["fused_compressed_dim"]
        flops = [flops_of(model.backbone, count) for count in (table["fused_tokens"], table["fine_tokens"])]
    assert flops[0][0] / flops[1][0] == table["linear_flops_ratio"]
    assert flops[0][1] / flops[1][1] == table["attention_flops_ratio"]


def flops_of(model: LlamaGenerator, count: int) -> tuple[int, int]:
    """Operations of linear layers and of attention for so many tokens, the prefix aside."""
    block = model.stack.blocks[0]
    with FlopCounterMode(display=False) as counter:
        block(torch.zeros(1, count, model.width), torch.zeros(count, model.stack.head_dim // 2, 2), Sight(causal=True),
              None, 0, None)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in counts.items() if "attention" in name or "bmm" in name)
    return sum(counts.values()) - attention, attention


# 7. Cache

@pytest.mark.parametrize("backbone", [LlamaGen, DAR, NAR])
@pytest.mark.parametrize("text", [False, True])
def test_cached_decoding_equals_uncached(backbone: type[LlamaGenerator], text: bool) -> None:
    model = tiny(text=text, backbone=backbone)
    condition, guidance = condition_of(model, 3), Ramp(3.0)
    decoding = model.begin(condition, draws=Draws(0, range(3)), guidance=guidance)
    count = 0
    for step in decoding.steps:
        prediction = decoding.predict(step)
        assert torch.equal(step.positions, step.positions.sort(dim=1).values)
        conditional = model.logits(decoding.tokens, condition)  # tokens not drawn yet are zeros, and unseen
        null = model.logits(decoding.tokens, model.conditioner.null(condition))
        expected = null + guidance(step) * (conditional - null)
        torch.testing.assert_close(prediction.logits, expected[:, step.positions[0]], atol=5e-5, rtol=1e-4)
        decoding.commit(step, prediction.draw(Draws(0, range(3))).tokens)
        count += step.positions.shape[1]
    assert count == 24 and len(decoding.tokens.unique()) > 8


# 8. Guidance

@pytest.mark.parametrize("table", TABLES["cfg_schedules"], ids=lambda table: "{n}_{scale}".format(**table))
def test_guidance_schedules(table: dict[str, Any]) -> None:
    def values(schedule: Schedule) -> list[float]:
        return [schedule(Step(index=index, of=table["n"], positions=torch.zeros(1, 4), drawn=4 * index,
                              left=4 * (table["n"] - index - 1), total=4 * table["n"])) for index in range(table["n"])]

    assert values(Ramp(table["scale"])) == pytest.approx(table["half_linear"])
    assert values(Ramp(table["scale"], until=1.0)) == pytest.approx(table["linear"])
    assert values(Constant(table["scale"])) == pytest.approx(table["constant"])


def test_guidance_of_one_is_no_guidance() -> None:
    model = tiny()
    condition = condition_of(model, 2)
    plain = draw(model, condition)
    assert torch.equal(draw(model, condition, guidance=Ramp(1.0)), plain)
    guided = draw(model, condition, guidance=Ramp(6.0))
    first = windows_of(model) == 0  # the ramp begins at 1
    assert torch.equal(guided[:, first], plain[:, first]) and not torch.equal(guided, plain)


# 9. Drawing and learning

def test_greedy_windows_are_the_argmax_of_every_place() -> None:
    model = tiny()
    condition = condition_of(model, 2)
    tokens = draw(model, condition, draw={"temperature": 0.0})
    assert torch.equal(model.logits(tokens, condition).argmax(dim=-1), tokens)


def test_the_loss_is_the_mean_over_places() -> None:
    model = tiny()
    batch = Batch(tokens=torch.randint(CODES, (3, 24)), condition=condition_of(model, 3))
    draws = Draws(0, range(3))
    dropped = draws.uniform("drop_condition") < 0.1
    log_probabilities = model.logits(batch.tokens, batch.condition, dropped).log_softmax(dim=-1)
    each = -log_probabilities.gather(2, batch.tokens[..., None])[..., 0]
    places = [each[:, model.order.positions[:, place]].mean() for place in range(4)]
    torch.testing.assert_close(model.loss(batch, draws, 0.0).total, torch.stack(places).mean())


# 10. z-loss

def test_z_loss() -> None:
    plain, weighted = tiny(), tiny(z_loss=0.01)
    batch, draws = Batch(tokens=torch.randint(CODES, (3, 24)), condition=condition_of(plain, 3)), Draws(0, range(3))
    logits = plain.logits(batch.tokens, batch.condition, draws.uniform("drop_condition") < 0.1)

    without, both = (model.loss(batch, draws, 0.0) for model in (plain, weighted))
    assert set(without.parts) == {"cross_entropy"} and torch.equal(without.total, without.parts["cross_entropy"])
    torch.testing.assert_close(both.parts["cross_entropy"], without.total)
    torch.testing.assert_close(both.parts["z"], 0.01 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(both.total, both.parts["cross_entropy"] + both.parts["z"])

    class Shifted(TokenShuffle):
        """All logits larger by the same constant."""

        def project(self, head: int, features: Tensor) -> Tensor:
            return super().project(head, features) + 2.5

    weighted.__class__ = Shifted
    shifted = weighted.loss(batch, draws, 0.0)
    torch.testing.assert_close(shifted.parts["cross_entropy"], both.parts["cross_entropy"])
    torch.testing.assert_close(shifted.parts["z"], 0.01 * (logits.logsumexp(-1) + 2.5).square().mean())


# 11. Parameters

@pytest.mark.parametrize("table", TABLES["parameter_counts"], ids=lambda table: "{d}_{s}".format(**table))
def test_parameter_counts(table: dict[str, Any]) -> None:
    sizes = {"width": table["d"], "ids": table["s"] ** 2, "blocks": table["mlp_blocks"]}
    with torch.device("meta"):
        shuffle, unshuffle = Shuffle(**sizes), Unshuffle(**sizes)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert shuffle.blocks[0].up.out_features == table["mlp_mult"] * table["d"]
    assert {"compress": count(shuffle.compress), "expand": count(unshuffle.expand), "block": count(shuffle.blocks[0]),
            "shuffle_total": count(shuffle), "unshuffle_total": count(unshuffle)}.items() <= table.items()


# The rest

@pytest.mark.parametrize("text", [False, True])
def test_an_image_does_not_depend_on_its_batch(text: bool) -> None:
    model = tiny(text=text)
    condition, order = condition_of(model, 6), torch.tensor([4, 0, 5])
    together = draw(model, condition, guidance=Ramp(3.0))
    some = Condition(size=3, **{name: value[order] for name, value in vars(condition).items()
                                if isinstance(value, Tensor)})
    sampled = Autoregressive(guidance=Ramp(3.0)).sample(model, some, Draws(5, tuple(order.tolist()))).tokens
    assert torch.equal(sampled, together[order]) and len(together.unique(dim=0)) == 6


def test_windows_of_one_take_official_files_and_others_say_what_is_missing() -> None:
    plain = tiny(window=1, blocks=0)
    official = plain.backbone.key_maps()["llamagen"].to_official(plain.backbone.state_dict())
    load_strictly(plain, plain.key_maps()["llamagen"].to_ours(official), "an official file")
    shuffled = tiny()
    with pytest.raises(ValueError, match=r"missing \(shuffle\.compress"):
        load_strictly(shuffled, shuffled.key_maps()["llamagen"].to_ours(official), "an official file")
    key_map = shuffled.key_maps()["llamagen"]
    there_and_back = key_map.to_ours(key_map.to_official(shuffled.state_dict()))
    assert there_and_back.keys() == shuffled.state_dict().keys()


def test_training_lowers_the_loss() -> None:
    model = tiny().train()
    batch = Batch(tokens=torch.arange(24).repeat(4, 1), condition=Condition.classes(torch.arange(4)))
    losses = losses_while_learning(model, batch, steps=40)
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="4 x 5 tokens does not split into windows of 2 x 2"):
        tiny(shape=(4, 5))
    with pytest.raises(ValueError, match="width 32 must be a multiple of 9"):
        tiny(shape=(3, 6), window=3)
    with pytest.raises(ValueError, match="window >= 1"):
        tiny(window=0)
    model, draws = tiny(), Draws(0, (0,))
    with pytest.raises(ValueError, match="unknown class id 7: this generator knows 0 to 6"):
        model.begin(Condition.classes(torch.tensor([7])), draws=draws)
    with pytest.raises(ValueError, match="text features were given"):
        model.begin(condition_of(tiny(text=True), 1), draws=draws)
    with pytest.raises(ValueError, match="share of the steps in"):
        Ramp(2.0, until=0.0)
    with pytest.raises(ValueError, match="discrete grids"):
        TokenShuffle(spec=TokenSpec(kind="discrete", shape=(16,), size=8), backbone=LlamaGen, window=2, blocks=0,
                     z_loss=0.0)
