"""MAR, its masked order and its decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_case import fill
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, LinearInTokens, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.mar import MAR
from varzoo.generators.masked import MaskPlan, masked_steps
from varzoo.nn.masked_vit import block_at
from varzoo.nn.rows import take_rows
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.optim import WarmupConstant, WarmupCosine, parameter_groups

GRID = (3, 5)


TINY = {
    "spec": TokenSpec(kind="continuous", shape=GRID, size=4), "num_classes": 6, "encoder_width": 24,
    "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2,
    "mlp_ratio": 2.0, "buffer_size": 3, "norm_eps": 1e-6, "head_width": 16, "head_depth": 1,
    "noise_schedule": "cosine", "noise_steps": 1000, "head_batch": 2, "mask_ratio_min": 0.7, "class_drop": 0.1,
    "attention_dropout": 0.0, "projection_dropout": 0.0,
}


def build(**changes: Any) -> MAR:
    return MAR(**TINY | changes)


@pytest.fixture
def model() -> MAR:
    """A MAR whose layers all matter (a new head is zero)."""
    model = build().eval()
    state = {name: torch.from_numpy(fill(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    load_strictly(model, state, "the test")
    return model


def sample(model: MAR, condition: Condition, draws: Draws, *, guidance: Schedule | None = None, steps: int = 5,
           **draw: Any) -> Tensor:
    # The lower half of the timesteps: with random weights the upper half amplifies rounding errors.
    sampler = Autoregressive(guidance=guidance, plan=MaskPlan(steps=steps), draw={"steps": "6,0"} | draw)
    return sampler.sample(model, condition, draws).tokens


def labels(*ids: int) -> Condition:
    return Condition.classes(torch.tensor(ids))


@pytest.mark.parametrize("guidance", [None, LinearInTokens(3.0)])
def test_an_image_does_not_depend_on_its_batch(model: MAR, guidance: Schedule | None) -> None:
    together = sample(model, labels(0, 1, 2, 3, 4, 5, 0, 1), Draws(7, tuple(range(8))), guidance=guidance)
    alone = sample(model, labels(2), Draws(7, (2,)), guidance=guidance)
    others = sample(model, labels(5, 2), Draws(7, (90, 2)), guidance=guidance)
    assert torch.allclose(alone[0], together[2], atol=1e-4) and torch.allclose(others[1], together[2], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_no_labels_is_the_null_class(model: MAR) -> None:
    nothing = sample(model, Condition.nothing(2), Draws(0, (0, 1)))
    with torch.no_grad():
        model.class_embed.weight[3] = model.null_class[0]
    assert torch.equal(nothing, sample(model, labels(3, 3), Draws(0, (0, 1))))


def test_guidance_of_one_is_no_guidance(model: MAR) -> None:
    plain = sample(model, labels(1, 2), Draws(0, (0, 1)))
    assert torch.equal(plain, sample(model, labels(1, 2), Draws(0, (0, 1)), guidance=Constant(1.0)))
    assert not torch.allclose(plain, sample(model, labels(1, 2), Draws(0, (0, 1)), guidance=Constant(1.5)))


def test_predictions_are_idempotent_and_commits_overwrite(model: MAR) -> None:
    decoding = model.begin(labels(1, 2), draws=Draws(0, (0, 1)), plan=MaskPlan(steps=3))
    step = next(decoding.steps)
    before = decoding.predict(step).condition
    tokens = torch.randn(2, step.positions.shape[1], 4)
    decoding.commit(step, tokens + 1)
    decoding.commit(step, tokens)
    assert torch.equal(take_rows(decoding.tokens, step.positions), tokens)
    assert torch.equal(decoding.predict(step).condition, before)
    assert next(decoding.steps).index == 1  # what is left, after the one taken


def test_any_set_of_positions_can_be_asked_for(model: MAR) -> None:
    decoding = model.begin(labels(1), draws=Draws(0, (0,)), plan=MaskPlan(steps=4))
    first, second, *_ = decoding.steps
    merged = torch.cat([first.positions, second.positions], dim=1).sort(dim=1).values
    both = decoding.predict(type(second)(**vars(second) | {"positions": merged}))
    alone = decoding.predict(second)
    rows = both.condition[0, 0, torch.isin(merged[0], second.positions[0])]
    assert torch.allclose(rows, alone.condition[0, 0], atol=1e-5)


def test_every_sampler_seed_gives_finite_tokens_of_every_position(model: MAR) -> None:
    tokens = sample(model, labels(0, 5), Draws(1, (0, 1)), steps=40)  # more steps than the 15 tokens
    assert tokens.shape == (2, 15, 4) and torch.isfinite(tokens).all() and (tokens != 0).all()


@pytest.mark.parametrize("total, steps", [(15, 4), (15, 15), (15, 40), (1, 1), (1, 3), (256, 64)])
def test_masked_steps_draw_every_position_once(total: int, steps: int) -> None:
    order = Draws(0, (0, 1)).permutation("order", total)
    taken = list(masked_steps(MaskPlan(steps=steps), order))
    drawn = torch.cat([step.positions for step in taken], dim=1)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(total).expand(2, -1))
    assert all((step.positions.diff(dim=1) > 0).all() for step in taken)
    assert [step.drawn for step in taken] == [sum(s.positions.shape[1] for s in taken[:i]) for i in range(len(taken))]
    assert all(step.left >= 1 and step.of == steps for step in taken) and taken[-1].index == steps - 1
    if steps >= total:
        assert all(step.positions.shape[1] == 1 for step in taken) and len(taken) == total


@pytest.mark.parametrize("settings, message", [
    ({"condition": labels(0, 6)}, "unknown class id 6: this generator knows 0 to 5"),
    ({"condition": labels(-1, 0)}, "unknown class id -1"),
    ({"guidance": Constant(0.5)}, r"guidance scale 0\.5 is below 1"),
    ({"plan": None}, r"give plan=MaskPlan\(steps=\.\.\.\)"),
    ({"plan": 64}, r"give plan=MaskPlan.*got 64"),
])
def test_bad_requests_are_refused(model: MAR, settings: dict[str, Any], message: str) -> None:
    good = {"condition": labels(0, 1), "guidance": None, "plan": MaskPlan(steps=4)} | settings
    with pytest.raises(ValueError, match=message):
        model.begin(good.pop("condition"), draws=Draws(0, (0, 1)), **good)


def test_bad_plans_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        MaskPlan(steps=0)
    with pytest.raises(ValueError, match="continuous tokens, got a spec of discrete"):
        build(spec=TokenSpec(kind="discrete", shape=GRID, size=4))
    with pytest.raises(ValueError, match="buffer_size=0"):
        build(buffer_size=0)
    with pytest.raises(ValueError, match="mask_ratio_min"):
        build(mask_ratio_min=1.5)


def test_official_names_and_back(model: MAR) -> None:
    key_map = model.key_maps()["mar"]
    official = key_map.to_official(model.state_dict())
    assert {"fake_latent", "encoder_blocks.0.attn.qkv.bias", "diffusion_pos_embed_learned",
            "diffloss.net.res_blocks.0.adaLN_modulation.1.weight"} <= set(official)
    again = key_map.to_official(key_map.to_ours(official))
    assert list(again) == list(official) and all(torch.equal(again[name], official[name]) for name in official)
    with pytest.raises(ValueError, match="does not know: output_pos_embed"):
        key_map.to_ours(official | {"output_pos_embed": torch.zeros(1)})


@pytest.mark.parametrize("width, depth, heads, head_depth, head_width, millions", [
    (768, 12, 12, 6, 1024, 207.92), (1024, 16, 16, 8, 1280, 478.33), (1280, 20, 16, 12, 1536, 942.40)])
def test_published_sizes(width: int, depth: int, heads: int, head_depth: int, head_width: int,
                         millions: float) -> None:
    with torch.device("meta"):
        model = build(
            spec=TokenSpec(kind="continuous", shape=(16, 16), size=16), num_classes=1000, encoder_width=width,
            encoder_depth=depth, encoder_heads=heads, decoder_width=width, decoder_depth=depth, decoder_heads=heads,
            mlp_ratio=4.0, buffer_size=64, head_width=head_width, head_depth=head_depth)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_last_block_at_some_rows_equals_the_block(model: MAR) -> None:
    block, tokens = model.backbone.decoder_blocks[-1], torch.randn(2, 9, 16)
    positions = torch.tensor([[0, 3, 8], [1, 2, 7]])
    assert torch.allclose(block_at(block, tokens, positions), take_rows(block(tokens), positions), atol=1e-5)


def test_masked_tokens_are_not_seen(model: MAR) -> None:
    tokens, visible = torch.randn(1, 15, 4), torch.tensor([[2, 4, 9]])
    everywhere, vectors = torch.arange(15)[None], model.class_vectors(labels(1))
    changed = tokens.clone()
    changed[0, 5] += 1
    assert torch.equal(*(model.backbone(x, visible, vectors, everywhere) for x in (tokens, changed)))
    changed[0, 4] += 1
    assert not torch.allclose(*(model.backbone(x, visible, vectors, everywhere) for x in (tokens, changed)))


def batch_of(count: int, **more: Any) -> Batch:
    return Batch(tokens=torch.randn(count, 15, 4), condition=labels(*range(count)), **more)


def test_sample_weights_weigh_the_loss() -> None:
    model, batch, draws = build(), batch_of(3), Draws(0, (0, 1, 2))
    weighted = lambda *weights: model.loss(  # noqa: E731
        Batch(tokens=batch.tokens, condition=batch.condition, weights=torch.tensor(weights)), draws, 0.0).total
    plain = model.loss(batch, draws, 0.0)
    assert torch.allclose(plain.total, weighted(2.0, 2.0, 2.0))
    assert torch.allclose(plain.total, (weighted(1.0, 0, 0) + weighted(0, 1.0, 0) + weighted(0, 0, 1.0)) / 3)
    assert torch.allclose(plain.total, sum(plain.parts.values()))


def test_loss_is_a_function_of_its_draws() -> None:
    model, batch = build().eval(), batch_of(2)
    first, again, other = (model.loss(batch, Draws(0, (0, 1)).keyed(iteration=i), 0.0).total for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("class_drop, trained", [(0.0, "class_embed.weight"), (1.0, "null_class")])
def test_dropped_classes_train_the_null_class(model: MAR, class_drop: float, trained: str) -> None:
    model.class_drop = class_drop
    model.loss(batch_of(3), Draws(0, (0, 1, 2)), 0.0).total.backward()
    reached = {name for name in ("class_embed.weight", "null_class")
               if model.get_parameter(name).grad is not None and model.get_parameter(name).grad.abs().max() > 0}
    assert reached == {trained}


def test_overfits_a_constant() -> None:
    model = build(head_width=32)
    batch = Batch(tokens=torch.full((8, 15, 4), 0.5), condition=labels(0, 1, 2, 3, 4, 5, 0, 1))
    optimizer = torch.optim.AdamW(parameter_groups(model, model.decays), lr=3e-3, weight_decay=0.02)
    losses = []
    for iteration in range(60):
        loss = model.loss(batch, Draws(0, tuple(range(8))).keyed(iteration=iteration), 0.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.parts["epsilon"].item())
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # the head starts at zero
    assert sum(losses[-10:]) / 10 < 0.4


def test_head_and_vectors_do_not_decay() -> None:
    model = build()
    decayed, others = parameter_groups(model, model.decays)
    optimizer = torch.optim.AdamW([decayed, others], weight_decay=0.02)
    rates = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    rate = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert rate["class_embed.weight"] == rate["null_class"] == rate["backbone.mask_token"] == 0.02
    assert rate["backbone.encoder_norm.weight"] == rate["backbone.decoder_embed.bias"] == 0
    assert rate["head.input.weight"] == rate["head.blocks.0.modulation.weight"] == 0


def test_learning_rate_factors() -> None:
    constant, cosine = WarmupConstant(warmup=10), WarmupCosine(warmup=10, total=110, floor=0.1)
    assert [constant(step) for step in (0, 5, 10, 1000)] == [0, 0.5, 1, 1]
    assert [cosine(step) for step in (0, 5, 10, 60, 110, 500)] == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])
    assert WarmupConstant(warmup=0)(0) == 1
    with pytest.raises(ValueError, match="warm-up of 10 steps must end before the total of 10"):
        WarmupCosine(warmup=10, total=10, floor=0)
