"""TokenBridge: quantiser, tokenizer, channel head, decoding; and the Fourier head."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden_case import fill
from varzoo.core.checkpoint import load_strictly, save_weights
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec, require_same_tokens
from varzoo.core.steps import Constant, LinearInTokens, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.masked import MaskPlan
from varzoo.generators.tokenbridge import TokenBridge
from varzoo.loading import build as build_node
from varzoo.loading import compose_config, load_tokenizer, load_weights
from varzoo.nn.fourier_head import FourierHead, autocorrelation, cumulative, density, quantile
from varzoo.nn.gaussian_quantizer import GaussianQuantizer, gaussian_bins
from varzoo.predictions.channels import ChannelPrediction
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.tokenizers.kl import KLTokenizer
from varzoo.tokenizers.tokenbridge import TokenBridgeTokenizer, quantization_statistics

GRID, CHANNELS, LEVELS = (3, 5), 4, 8
FOURIER = partial(FourierHead, frequencies=3, penalty_weight=1e-2, floor=1e-5, weight_divisor=100.0, bias_divisor=100.0)


def quantizer(levels: int = LEVELS, **changes: float) -> GaussianQuantizer:
    return GaussianQuantizer(**{"levels": levels, "low": -5.0, "high": 5.0, "spread": 3.0} | changes)


def build(**changes: Any) -> TokenBridge:
    return TokenBridge(**{
        "spec": TokenSpec(kind="discrete", shape=GRID, size=LEVELS, depth=CHANNELS), "quantizer": quantizer(),
        "num_classes": 6, "encoder_width": 24, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16,
        "decoder_depth": 2, "decoder_heads": 2, "mlp_ratio": 2.0, "buffer_size": 3, "norm_eps": 1e-6,
        "head_width": 16, "head_depth": 2, "head_heads": 2, "channel_order": [2, 0, 3, 1], "classifier": nn.Linear,
        "mask_ratio_min": 0.7, "class_drop": 0.1, "attention_dropout": 0.0, "projection_dropout": 0.0} | changes)


def filled(model: nn.Module) -> nn.Module:
    """A model whose layers all matter (a new head's modulations are zero)."""
    state = {name: torch.from_numpy(fill(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    load_strictly(model, state, "the test")
    return model.eval()


@pytest.fixture(params=[nn.Linear, FOURIER], ids=["linear", "fourier"])
def model(request: pytest.FixtureRequest) -> TokenBridge:
    return filled(build(classifier=request.param))


def labels(*ids: int) -> Condition:
    return Condition.classes(torch.tensor(ids))


def sample(model: TokenBridge, condition: Condition, draws: Draws, *, guidance: Schedule | None = None,
           steps: int = 5, **draw: Any) -> Tensor:
    return Autoregressive(guidance=guidance, plan=MaskPlan(steps=steps), draw=draw).sample(
        model, condition, draws).tokens


def small_vae(**changes: Any) -> KLTokenizer:
    return KLTokenizer(**{
        "image_size": (12, 20), "width": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention_levels": [],
        "latent_channels": CHANNELS, "patch_size": 2, "scale": 0.7, "shift": 0.0, "kl_weight": 1e-6} | changes)


# quantiser

@pytest.mark.parametrize("levels", [2, 8, 64, 512])
def test_every_level_is_its_own_nearest(levels: int) -> None:
    table = quantizer(levels)
    ids = torch.arange(levels)
    assert torch.equal(table.ids(table.values(ids)), ids)
    assert (table.table.diff() > 0).all() and torch.allclose(table.table, -table.table.flip(0), atol=1e-3)
    edges, means = gaussian_bins(levels, 3.0)
    assert (means > edges[:-1]).all() and (means < edges[1:]).all()


def test_bins_have_equal_mass_and_the_nearest_mean_wins() -> None:
    table = quantizer(8)
    t = torch.linspace(-2.9, 2.9, 2001)
    ids = table.ids(t * 5 / 3)
    edges, means = gaussian_bins(8, 3.0)
    assert torch.equal(ids, (t[:, None] - means).abs().argmin(dim=1))
    assert (ids != torch.searchsorted(edges, t) - 1).any()  # not the bin that it lies in
    assert torch.allclose(torch.distributions.Normal(0.0, 1.0).cdf(edges[1:-1]), torch.arange(1, 8) / 8, atol=1e-6)


def test_numbers_outside_of_the_range_are_clamped_and_counted() -> None:
    table = quantizer()
    numbers = torch.tensor([-100.0, -5.0, 0.1, 5.0, 5.1])
    assert table.ids(numbers).tolist() == [0, 0, 4, LEVELS - 1, LEVELS - 1]
    assert table.outside(numbers).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("changes, message", [
    ({"levels": 1024}, "1024 levels do not fit into 3 standard deviations: choose 2 to 740"),
    ({"levels": 741}, "741 levels do not fit"), ({"levels": 1}, "1 levels do not fit"),
    ({"low": 5.0}, r"need low < high and spread > 0, got low=5\.0"), ({"spread": 0.0}, "spread=0"),
])
def test_ranges_and_levels_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(**changes)
    assert quantizer(740).table.isfinite().all()


# tokenizer

def test_tokenizer_quantises_the_latents_of_its_vae() -> None:
    vae = small_vae().eval()
    tokenizer = TokenBridgeTokenizer(vae=vae, quantizer=quantizer(256)).eval()
    images = torch.rand(2, 3, 12, 20) * 2 - 1
    assert tokenizer.spec == TokenSpec(kind="discrete", shape=(3, 5), size=256, depth=16)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 15, 16) and ids.dtype == torch.int64
    assert (tokenizer.quantizer.values(ids) - vae.encode(images)).abs().max() < 0.1
    assert (tokenizer.decode(ids) - vae.decode(vae.encode(images))).abs().mean() < 0.05
    drawn = tokenizer.encode(images, Draws(0, (0, 1)))
    assert torch.equal(drawn, tokenizer.quantizer.ids(vae.encode(images, Draws(0, (0, 1))))) and (drawn != ids).any()
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    other = tokenizer.at_size((8, 8))
    assert other.spec.shape == (2, 2) and tokenizer.spec.shape == (3, 5) == tokenizer.vae.spec.shape
    assert other.encode(images[..., :8, :8]).shape == (2, 4, 16)


def test_statistics_of_quantisation() -> None:
    vae = small_vae(scale=20.0).eval()
    batches = [torch.rand(3, 3, 12, 20) * 2 - 1, torch.rand(1, 3, 12, 20) * 2 - 1]
    found = quantization_statistics(TokenBridgeTokenizer(vae=vae, quantizer=quantizer()), batches)
    with torch.no_grad():
        latents = torch.cat([vae.encode(images) for images in batches])
    assert found.count == latents.numel() and found.outside == int((latents.abs() > 5).sum()) > 0
    assert found.error == pytest.approx((quantizer().values(quantizer().ids(latents)) - latents).square().mean().item(),
                                        rel=1e-4)
    assert found.channel_levels.shape == (16,) and (found.channel_levels <= LEVELS).all()
    with pytest.raises(ValueError, match="was given no images"):
        quantization_statistics(TokenBridgeTokenizer(vae=vae, quantizer=quantizer()), [])


def test_files_of_the_vae_and_of_its_own(tmp_path: Path) -> None:
    config = compose_config("train", ["experiment=smoke_tokenbridge", "tokenizer.vae.width=32"]).tokenizer
    vae = build_node(config.vae)
    vae_node = dict(config.vae) | {"scale": 0.5}  # as measured after training
    save_weights(tmp_path / "vae.safetensors", vae.state_dict(),
                 {"tokenizer": {name: list(value) if hasattr(value, "append") else value
                                for name, value in vae_node.items()}})
    tokenizer = load_tokenizer(tmp_path / "vae.safetensors", config)
    assert tokenizer.vae.scale == 0.5 and tokenizer.spec.depth == 4
    assert torch.equal(tokenizer.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    torch.save({"model": vae.key_maps()["mar"].to_official(vae.state_dict())}, tmp_path / "kl16.ckpt")
    official = load_tokenizer(tmp_path / "kl16.ckpt", config)
    assert all(torch.equal(official.state_dict()[name], value) for name, value in tokenizer.state_dict().items())
    for key_map in tokenizer.key_maps().values():
        there = key_map.to_official(tokenizer.state_dict())
        assert set(key_map.to_ours(there)) == set(tokenizer.state_dict()) and not any("vae." in key for key in there)


def test_tokenizers_that_do_not_fit() -> None:
    from varzoo.tokenizers.vq import VQTokenizer
    with torch.device("meta"):
        config = compose_config("sample", ["tokenizer=vq16", "generator=llamagen_b", "checkpoint=none"])
        vq = build_node(config.tokenizer)
    assert isinstance(vq, VQTokenizer)
    with pytest.raises(ValueError, match="quantises continuous tokens, but its VAE makes discrete"):
        TokenBridgeTokenizer(vae=vq, quantizer=quantizer())
    tokenizer = TokenBridgeTokenizer(vae=small_vae(), quantizer=quantizer())
    with pytest.raises(ValueError, match=r"expected ids \[B, 15, 16\]"):
        tokenizer.decode(torch.zeros(1, 15, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to train: train its VAE"):
        tokenizer.reconstruction_losses(torch.zeros(1, 3, 12, 20), Draws(0, (0,)))
    with pytest.raises(ValueError, match="tokenizer and generator do not fit"):
        require_same_tokens(tokenizer.spec, build().spec)


# head and prediction

def test_cached_head_equals_running_the_prefix_anew(model: TokenBridge) -> None:
    head, features = model.head, torch.randn(5, 16)
    state, ids = head.start(features), torch.zeros(5, 0, dtype=torch.int64)
    for k in range(head.channels):
        cached = head.step(state, k, ids[:, -1] if k else None)
        anew = head.logits(head.hidden(features, ids, sampling=True))[:, -1]
        assert torch.allclose(cached, anew, atol=1e-5)
        ids = torch.cat([ids, (cached + torch.rand_like(cached)).argmax(dim=-1, keepdim=True)], dim=1)
    again = head.step(state, 2, 1 + ids[:, 1] - 2 * (ids[:, 1] > 0).long())  # a step taken again with other ids
    assert not torch.allclose(again, head.logits(head.hidden(features, ids[:, :2], sampling=True))[:, -1], atol=1e-4)
    assert torch.equal(head.step(state, 2, ids[:, 1]), head.step(state, 2, ids[:, 1]))


def test_training_begins_the_sequence_otherwise_than_sampling(model: TokenBridge) -> None:
    features, before = torch.randn(2, 16), torch.zeros(2, 3, dtype=torch.int64)
    one, other = (model.head.logits(model.head.hidden(features, before, sampling=s)) for s in (True, False))
    assert (one - other).abs().max() > 1e-3
    with torch.no_grad():
        model.head.condition_positions[:, 0] = 0
    one, other = (model.head.logits(model.head.hidden(features, before, sampling=s)) for s in (True, False))
    assert torch.allclose(one, other, atol=1e-6)


def test_later_channels_do_not_change_earlier_ones(model: TokenBridge) -> None:
    features, before = torch.randn(2, 16), torch.zeros(2, 3, dtype=torch.int64)
    changed = before.clone()
    changed[:, 2] = 1
    one, other = (model.head.logits(model.head.hidden(features, ids, sampling=False)) for ids in (before, changed))
    assert torch.allclose(one[:, :3], other[:, :3], atol=1e-6) and not torch.allclose(one[:, 3], other[:, 3], atol=1e-4)


def test_new_heads_see_no_further_than_the_channel_before() -> None:
    head = build().head
    before = torch.tensor([[0, 1, 2], [3, 4, 2]])
    logits = head.logits(head.hidden(torch.randn(2, 16), before, sampling=False))
    assert torch.equal(logits[0, 3], logits[1, 3])  # all gates are zero
    assert not torch.allclose(logits[0, 1], logits[1, 1]) and not torch.allclose(logits[0, 0], logits[1, 0])


def prediction_of(model: TokenBridge, features: Tensor) -> ChannelPrediction:
    positions = torch.arange(features.shape[1]).expand(len(features), -1)
    return ChannelPrediction(features=features, positions=positions, head=model.head)


@torch.no_grad()
def test_draws_follow_the_distribution(model: TokenBridge) -> None:
    prediction = prediction_of(model, torch.randn(1, 1, 16).expand(4000, 1, 16))
    draws, temperature = Draws(3, tuple(range(4000))), 0.8
    (logits, ids), *_ = prediction.channels(draws, temperature=temperature)
    expected = (logits[0, 0] / temperature).softmax(dim=-1)
    assert (F.one_hot(ids[:, 0], LEVELS).float().mean(dim=0) - expected).abs().max() < 0.04


@torch.no_grad()
def test_temperature_zero_takes_the_likeliest_and_the_order_is_undone(model: TokenBridge) -> None:
    prediction = prediction_of(model, torch.randn(2, 3, 16))
    drawn = list(prediction.channels(Draws(0, (0, 1)), temperature=0))
    assert all(torch.equal(ids, logits.argmax(dim=-1)) for logits, ids in drawn)
    result = prediction.draw(Draws(5, (7, 8)), temperature=0)
    assert result.evaluations == CHANNELS
    for (_, ids), channel in zip(drawn, [2, 0, 3, 1]):
        assert torch.equal(result.tokens[..., channel], ids)
    assert torch.equal(prediction.draw(Draws(5, (7, 8)), temperature=1e-4).tokens, result.tokens)
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got -0\.5"):
        prediction.draw(Draws(0, (0, 1)), temperature=-0.5)


# generator

@pytest.mark.parametrize("guidance", [None, LinearInTokens(3.0)])
def test_an_image_does_not_depend_on_its_batch(model: TokenBridge, guidance: Schedule | None) -> None:
    together = sample(model, labels(0, 1, 2, 3, 4, 5, 0, 1), Draws(7, tuple(range(8))), guidance=guidance)
    alone = sample(model, labels(2), Draws(7, (2,)), guidance=guidance)
    order = [3, 0, 2, 1]
    permuted = sample(model, labels(*order), Draws(7, tuple(order)), guidance=guidance)
    assert torch.equal(alone[0], together[2]) and torch.equal(permuted, together[order])
    assert (together[0] != together[1]).any() and together.shape == (8, 15, CHANNELS)


def test_two_decodings_at_once(model: TokenBridge) -> None:
    apart = [sample(model, labels(i, i + 1), Draws(i, (0, 1)), steps=3) for i in (0, 3)]
    decodings = [model.begin(labels(i, i + 1), draws=Draws(i, (0, 1)), plan=MaskPlan(steps=3)) for i in (0, 3)]
    with torch.no_grad():
        for steps in zip(*(decoding.steps for decoding in decodings)):
            predictions = [decoding.predict(step) for decoding, step in zip(decodings, steps)]
            for i, decoding, step, prediction in zip((0, 3), decodings, steps, predictions):
                decoding.commit(step, prediction.draw(Draws(i, (0, 1))).tokens)
    assert all(torch.equal(decoding.tokens, tokens) for decoding, tokens in zip(decodings, apart))


def test_guidance_acts_on_features(model: TokenBridge) -> None:
    condition, draws, plan = labels(1, 2), Draws(0, (0, 1)), MaskPlan(steps=3)
    features = {}
    for scale in (1.0, 2.0, 3.0):
        decoding = model.begin(condition, draws=draws, guidance=Constant(scale), plan=plan)
        features[scale] = decoding.predict(next(decoding.steps)).features
    assert torch.allclose(features[3.0] - features[2.0], features[2.0] - features[1.0], atol=1e-5)
    assert not torch.allclose(features[2.0], features[1.0], atol=1e-3)
    plain = sample(model, condition, draws)
    assert torch.equal(plain, sample(model, condition, draws, guidance=Constant(1.0)))


def test_the_loss_is_the_cross_entropy_of_masked_channels(model: TokenBridge) -> None:
    tokens = torch.randint(LEVELS, (3, 15, CHANNELS), generator=torch.Generator().manual_seed(0))
    draws = Draws(0, (0, 1, 2))
    loss = lambda tokens, **more: model.loss(  # noqa: E731
        Batch(tokens=tokens, condition=labels(0, 1, 2), **more), draws, 0.0)
    plain = loss(tokens)
    assert torch.allclose(plain.total, plain.parts["cross_entropy"] + plain.parts["penalty"], atol=1e-6)
    assert (plain.parts["penalty"] > 0) == isinstance(model.head.classifiers[0], FourierHead)
    one = torch.stack([loss(tokens, weights=torch.eye(3)[i]).total for i in range(3)]).mean()
    assert torch.allclose(plain.total, one, atol=1e-5)
    assert torch.equal(loss(tokens).total, plain.total)
    assert not torch.equal(loss((tokens + 1) % LEVELS).total, plain.total)


def test_everything_is_trained(model: TokenBridge) -> None:
    tokens = torch.randint(LEVELS, (4, 15, CHANNELS))
    model.class_drop = 0.5
    total = sum(model.loss(Batch(tokens=tokens, condition=labels(0, 1, 2, 3)), Draws(i, range(4)), 0.0).total
                for i in range(3))
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("changes, message", [
    ({"spec": TokenSpec(kind="continuous", shape=GRID, size=4)}, "several discrete channels per token, got a spec"),
    ({"spec": TokenSpec(kind="discrete", shape=GRID, size=LEVELS)}, "several discrete channels"),
    ({"quantizer": quantizer(16)}, "4 channels of 8 levels, but the channel order names 4 and the quantizer has 16"),
    ({"channel_order": [0, 1, 2]}, "the channel order names 3"),
    ({"channel_order": [0, 1, 2, 2]}, r"names every channel from 0 to 3 once, got \[0, 1, 2, 2\]"),
    ({"head_heads": 3}, "width 16 must be a multiple of its 3 heads"),
    ({"mask_ratio_min": 1.5}, "mask_ratio_min"), ({"class_drop": -0.1}, "class_drop"),
])
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_bad_requests_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"TokenBridge leaves the number of steps open: give plan=MaskPlan"):
        model.begin(labels(0), draws=Draws(0, (0,)))
    with pytest.raises(ValueError, match="unknown class id 6"):
        model.begin(labels(6), draws=Draws(0, (0,)), plan=MaskPlan(steps=2))
    with pytest.raises(ValueError, match=r"draw option 'top_k' does not fit.*takes temperature"):
        Autoregressive(draw={"top_k": 3}).check(model)


def test_official_files_and_back(tmp_path: Path) -> None:
    model = filled(build())
    key_map = model.key_maps()["tokenbridge"]
    official = key_map.to_official(model.state_dict())
    assert {"output_pos_embed", "channel_heads.3.bias", "token_embeddings.2.weight", "timesteps_embeddings",
            "channel_blocks.0.adaLN_modulation.1.weight", "channel_final.adaLN_modulation.1.bias", "channel_mask",
            "reconstruction_values", "boundaries"} <= set(official)
    assert official["channel_mask"].tolist()[1] == [0, 0, -math.inf, -math.inf]
    again = key_map.to_official(key_map.to_ours(official))
    assert set(again) == set(official) and all(torch.equal(again[name], official[name]) for name in official)
    tables = {"channel_mask", "reconstruction_values", "boundaries"}
    ema = {name: tensor for name, tensor in official.items() if name not in tables}
    torch.save({"model": {name: torch.zeros_like(tensor) for name, tensor in official.items()}, "model_ema": ema,
                "optimizer": {}, "epoch": 3, "scaler": {}}, tmp_path / "checkpoint-last.pth")
    loaded = load_weights(build(), tmp_path / "checkpoint-last.pth")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(ValueError, match=r"does not know: diffloss\.x"):
        key_map.to_ours(official | {"diffloss.x": torch.zeros(1)})


@pytest.mark.parametrize("size, millions, head", [("b", 218.0, 45.8), ("l", 486.9, 80.8), ("h", 910.0, 118.8)])
def test_published_sizes(size: str, millions: float, head: float) -> None:
    with torch.device("meta"):
        model = build_node(compose_config("sample", [f"generator=tokenbridge_{size}", "checkpoint=none"]).generator)
    count = lambda part: round(sum(parameter.numel() for parameter in part.parameters()) / 1e6, 1)  # noqa: E731
    assert (count(model), count(model.head)) == (millions, head)


# Fourier head

def test_fourier_head_is_a_distribution() -> None:
    head = FourierHead(6, 32, frequencies=5, penalty_weight=0.0, floor=1e-5, weight_divisor=1.0, bias_divisor=1.0)
    features = torch.randn(4, 3, 6)
    logits = head(features)
    assert torch.allclose(logits.exp().sum(dim=-1), torch.full((4, 3), 1 + 32e-5), atol=1e-5)
    assert logits.min() >= math.log(1e-5) - 1e-4 and head.penalty(features) == 0
    flat = FourierHead(6, 32, frequencies=0, penalty_weight=1.0, floor=1e-5, weight_divisor=1.0, bias_divisor=1.0)
    assert torch.allclose(flat(features), torch.full((4, 3, 32), math.log(1 / 32 + 1e-5)))


def test_fourier_density_identities() -> None:
    alpha = torch.randn(5, 7, dtype=torch.complex128)
    z = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    p = density(alpha, z.expand(5, -1))
    assert (p >= 0).all() and torch.allclose(torch.trapezoid(p, z), torch.ones(5, dtype=torch.float64), atol=1e-9)
    c = autocorrelation(alpha)
    k = torch.arange(1, 7, dtype=torch.float64)
    series = 0.5 + (c[:, 1:, None] / c[:, :1, None].real * torch.exp(1j * math.pi * k[:, None] * z)).real.sum(dim=1)
    assert torch.allclose(series, p, atol=1e-10)
    direct = torch.stack([(alpha[:, :7 - j].conj() * alpha[:, j:]).sum(dim=1) for j in range(7)], dim=1)
    assert torch.allclose(c, direct)
    at = torch.rand(5, dtype=torch.float64) * 1.8 - 0.9
    ends = [cumulative(alpha, torch.full((5,), end, dtype=torch.float64)) for end in (-1.0, 1.0)]
    assert torch.allclose(ends[0], torch.zeros(5, dtype=torch.float64)) and torch.allclose(ends[1], ends[0] + 1)
    slope = (cumulative(alpha, at + 1e-5) - cumulative(alpha, at - 1e-5)) / 2e-5
    assert torch.allclose(slope, density(alpha, at), atol=1e-6)
    assert torch.allclose(quantile(alpha, cumulative(alpha, at)), at, atol=1e-6)


def test_fourier_logits_do_not_see_a_common_factor_but_the_penalty_does() -> None:
    head = FOURIER(6, 16)
    features = torch.randn(8, 6)
    logits, penalty = head(features), head.penalty(features)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= 3
    assert torch.allclose(head(features), logits, atol=1e-4)
    assert torch.allclose(head.penalty(features), 81 * penalty, rtol=1e-4)


def test_a_fourier_head_learns_a_peak_that_is_smooth() -> None:
    head = FourierHead(1, 64, frequencies=8, penalty_weight=0.0, floor=1e-5, weight_divisor=100.0, bias_divisor=100.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    targets = (20 + 6 * torch.randn(4000, generator=torch.Generator().manual_seed(0))).round().long().clamp(0, 63)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(head(torch.ones(1, 1)).expand(4000, -1), targets).backward()
        optimizer.step()
    pmf = head(torch.ones(1, 1))[0].softmax(dim=-1)
    assert abs((pmf * torch.arange(64)).sum() - 20) < 1.5 and pmf.argmax() in range(17, 24)


@pytest.mark.parametrize("changes", [{"frequencies": -1}, {"floor": 0.0}, {"penalty_weight": -1.0}])
def test_bad_fourier_heads(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need at least 2 bins, frequencies >= 0"):
        FourierHead(**{"in_features": 4, "out_features": 8, "frequencies": 2, "penalty_weight": 0.0, "floor": 1e-5,
                       "weight_divisor": 1.0, "bias_divisor": 1.0} | changes)
