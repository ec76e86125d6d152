"""FlexTok: any prefix decodes, each sample by itself; what its files say; training; its generator."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.adapters.flextok import named_guidance, tokenizer_of
from tests.golden_case import load_case
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import Prefix
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.flextok_ar import FlexTokAR
from varzoo.generators.llamagen import LlamaGen
from varzoo.loading import Model, build, compose_config, load, load_tokenizer
from varzoo.nn.fsq import FSQ
from varzoo.nn.guidance import AdaptiveProjected, ClassifierFree, LinearInTime
from varzoo.nn.noise_levels import LogitNormal, StratifiedLogitNormal
from varzoo.nn.repa import REPA, Target, to_grid
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.flextok import FlexTok, FlowDecoder, RegisterEncoder
from varzoo.tokenizers.flextok.official import settings
from varzoo.tokenizers.flextok.tokenizer import NestedDropout, spread_loss
from varzoo.tokenizers.kl import KLTokenizer
from varzoo.training.run import train
from varzoo.training.tokenizer import TokenizerTraining

GOLDENS = Path(__file__).parent / "goldens"
N = 6


def tiny(image_size=8, *, alive: bool = True, **options) -> FlexTok:
    """2 x 2 patches of 4 x 4 latents, 6 tokens of 12 codes; `alive` gives the layers that begin at zero weights."""
    torch.manual_seed(3)
    vae = KLTokenizer(image_size=image_size, width=32, multipliers=[1, 1], blocks_per_level=1, attention_levels=[],
                      latent_channels=2, patch_size=1, scale=0.7, shift=0.1, kl_weight=0.0)
    shared = {"channels": 2, "patch_size": 2, "position_grid": (4, 4), "position_scaling": "absolute", "registers": N,
              "width": 16, "head_dim": 8, "mlp_ratio": 2.0}
    parts = {"encoder": RegisterEncoder(out_channels=2, depth=1, **shared), "quantizer": FSQ(levels=[4, 3]),
             "decoder": FlowDecoder(code_channels=2, depth=2, modulations=2, single_null=False, **shared)}
    settings = {"posterior": True, "kept": "uniform", "null_drop": 0.3, "noise_levels": LogitNormal(),
                "spread": 0.0, "repa": None, "steps": 3, "guidance": AdaptiveProjected(scale=4.0)}
    tokenizer = FlexTok(vae=vae, **(parts | settings | options)).eval()
    if alive:
        for parameter in (*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()):
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5)
    return tokenizer


def images_of(batch: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


def ids_of(batch: int) -> torch.Tensor:
    return torch.randint(12, (batch, N))


# Prefixes


def test_a_ragged_batch_decodes_as_its_samples_do_one_by_one() -> None:
    tokenizer, ids, draws = tiny(), ids_of(4), Draws(0, (5, 6, 7, 8))
    prefixes = [row[:k] for row, k in zip(ids, (1, 3, N, 2))]
    together = tokenizer.decode(prefixes, draws)
    for row, prefix in enumerate(prefixes):
        alone = tokenizer.decode(prefix[None], draws.rows([row]))
        torch.testing.assert_close(together[row:row + 1], alone, atol=2e-5, rtol=1e-4)
    padded = ids.clone()
    padded[0, 1:] = 99  # ids behind a prefix mean nothing, whatever they are
    torch.testing.assert_close(tokenizer.decode(padded, draws, lengths=[1, 3, N, 2]), together)
    order = [2, 0, 3, 1]
    permuted = tokenizer.decode([prefixes[row] for row in order], draws.rows(order))
    torch.testing.assert_close(permuted, together[order], atol=2e-5, rtol=1e-4)
    assert (tokenizer.decode([row[:2] for row in ids], draws) - tokenizer.decode(ids, draws)).abs().max() > 1e-3


def test_dropped_registers_count_as_often_as_there_are() -> None:
    """One token with a count equals as many tokens written out."""
    decoder, x, times = tiny().decoder, torch.randn(2, 2, 4, 4), torch.tensor([0.3, 0.9])
    codes, kept = torch.rand(2, 4, 2), torch.tensor([1, 4])
    merged = decoder.registers(codes, kept)
    assert merged.counts.tolist() == [[1, 0, 0, 0, N - 1], [1, 1, 1, 1, N - 4]]
    for row in range(2):
        known = merged.tokens[row, :kept[row]]
        written = torch.cat([known, decoder.mask_token.expand(N - len(known), -1)])[None]
        full = type(merged)(written, torch.ones(1, N))
        velocity, _ = decoder(x[row:row + 1], times[row:row + 1], full)
        torch.testing.assert_close(decoder(x, times, merged)[0][row:row + 1], velocity, atol=1e-5, rtol=1e-5)


def test_noise_is_a_function_of_seed_and_index() -> None:
    tokenizer, ids = tiny(), ids_of(1).expand(3, -1)
    images = tokenizer.decode(ids, Draws(1, (7, 8, 7)))
    torch.testing.assert_close(images[0], images[2])
    assert (images[0] - images[1]).abs().max() > 0.01
    assert not torch.equal(images, tokenizer.decode(ids, Draws(2, (7, 8, 7))))


@pytest.mark.parametrize(("tokens", "message"), [
    (torch.zeros(2, 0, dtype=torch.int64), "a prefix has between 1 and 6 tokens, got 0"),
    ([torch.zeros(1).long(), torch.zeros(0).long()], "a prefix has between 1 and 6 tokens, got 0"),
    (torch.zeros(2, N + 1, dtype=torch.int64), "a prefix has between 1 and 6 tokens, got 7"),
    (torch.full((2, 3), 12), "ids must lie in 0 to 11, the codebook; got 12 to 12"),
    (torch.full((2, 3), -1), "ids must lie in 0 to 11, the codebook; got -1 to -1"),
    (torch.zeros(3, dtype=torch.int64), r"expected ids \[B, k\] or a sequence of prefixes"),
    (torch.zeros(3, 2, dtype=torch.int64), "draws of 2 samples do not fit 3 sequences"),
])
def test_bad_tokens(tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().decode(tokens, Draws(0, (0, 1)))


def test_bad_lengths_and_missing_draws() -> None:
    tokenizer, ids, draws = tiny(), ids_of(2), Draws(0, (0, 1))
    with pytest.raises(ValueError, match="begins from noise: give draws"):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match="between 1 and 6 tokens, got 0"):
        tokenizer.decode(ids, draws, lengths=[0, 2])
    with pytest.raises(ValueError, match="a length of 4 exceeds the 3 ids"):
        tokenizer.decode(ids[:, :3], draws, lengths=[4, 2])
    with pytest.raises(ValueError, match="one length for each of 2 prefixes"):
        tokenizer.decode(ids, draws, lengths=[4])
    with pytest.raises(ValueError, match="whole number of solver steps, at least 1, got -1"):
        tokenizer.decode(ids, draws, steps=-1)


# Images and encoding


def test_images_need_not_be_square_and_must_divide() -> None:
    tokenizer = tiny([8, 16])
    ids = tokenizer.encode(images_of(2, 8, 16))
    assert ids.shape == (2, N) and tokenizer.decode(ids[:, :2], Draws(0, (0, 1))).shape == (2, 3, 8, 16)
    with pytest.raises(ValueError, match=r"multiples of the tokenizer's downsampling factor 2; got 9"):
        tiny(9)
    with pytest.raises(ValueError, match=r"give 5 x 5 latents, which do not split into patches of 2 x 2"):
        tiny(10)
    with pytest.raises(ValueError, match="a grid of 6 x 6 patches exceeds the position table of 4 x 4"):
        tiny(24).encode(images_of(1, 24, 24))


def test_encoding_is_deterministic_unless_draws_are_given() -> None:
    tokenizer, images = tiny(), images_of(1).expand(3, -1, -1, -1)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, tokenizer.train().compress(images)) and torch.equal(ids[0], ids[1])
    with torch.no_grad():
        tokenizer.vae.quant_conv.bias[2:] = 3.0  # log variances
    drawn = tokenizer.encode(images, Draws(0, (4, 5, 4)))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(tokenizer.encode(images[1:2], Draws(0, (5,))), drawn[1:2])


def test_the_first_registers_do_not_depend_on_how_many_follow() -> None:
    encoder, latents = tiny().encoder, torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(encoder(latents, 2), encoder(latents)[:, :2])
    assert len(tiny().encode(images_of(32)).unique()) > 3


@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [2, 3], [27, 38]])
def test_every_code_is_reached_and_has_one_id(levels: list[int]) -> None:
    quantizer = FSQ(levels=levels)
    ids = torch.arange(quantizer.size)
    codes = quantizer.codes(ids)
    assert torch.equal(quantizer.ids(codes), ids) and codes.abs().max() <= 1
    # The inverse of the bounding gives latents that quantise to every code.
    latents = torch.atanh((codes * quantizer.reach + quantizer.offset) / quantizer.span) - quantizer.shift
    torch.testing.assert_close(quantizer(latents), codes)


# Guidance


def test_guidance_keeps_its_momentum_per_sample_and_skips_what_it_does_not_need() -> None:
    tokenizer, ids, draws, calls = tiny(), ids_of(2), Draws(0, (0, 1)), []
    tokenizer.decoder.register_forward_hook(lambda *_: calls.append(1))
    tokenizer.decode(ids, draws, steps=4)
    assert len(calls) == 8
    plain = tokenizer.decode(ids, draws, steps=4, guidance=ClassifierFree(scale=1.0))
    assert len(calls) == 12
    flat = tokenizer.decode(ids, draws, steps=4, guidance=ClassifierFree(scale=LinearInTime(data=1.0, noise=1.0)))
    torch.testing.assert_close(plain, flat, atol=1e-5, rtol=1e-4)
    pushed = [tokenizer.decode(ids, draws, steps=4, guidance=AdaptiveProjected(scale=5.0, momentum=momentum))
              for momentum in (0.0, -0.5)]
    assert (pushed[0] - pushed[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"guidance scale 0\.5 is below 1"):
        ClassifierFree(scale=0.5)


# Training


def test_training_reaches_every_weight_but_the_vae_and_falls() -> None:
    tokenizer, images = tiny(alive=False).train(), images_of(16)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(60):
        reconstructions, loss = tokenizer.reconstruction_losses(images, Draws(0, range(16)).keyed(iteration=step))
        assert reconstructions is None and set(loss.parts) == {"flow", "perplexity"}
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    still = {name for name, value in tokenizer.state_dict().items() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith("vae.")}


def test_a_loss_depends_on_its_sample_alone() -> None:
    tokenizer, images, draws = tiny(), images_of(3), Draws(0, (3, 1, 2)).keyed(iteration=4)
    alone = [tokenizer.reconstruction_losses(images[row:row + 1], draws.rows([row]))[1].total for row in range(3)]
    torch.testing.assert_close(tokenizer.reconstruction_losses(images, draws)[1].total, torch.stack(alone).mean())


def test_what_is_dropped_has_no_influence() -> None:
    decoder, x, times = tiny().decoder, torch.randn(3, 2, 4, 4), torch.full((3,), 0.5)
    codes = torch.rand(3, N, 2, requires_grad=True)
    registers = decoder.registers(codes, torch.tensor([2, 4, N]), torch.tensor([False, True, False]))
    decoder(x, times, registers)[0].square().sum().backward()
    assert (codes.grad.abs().amax(dim=2) > 0).tolist() == [[True] * 2 + [False] * 4, [False] * N, [True] * N]


def test_nested_dropout_follows_its_law() -> None:
    draws = Draws(0, range(4000))
    uniform = NestedDropout("uniform", 5).draw(draws).bincount()
    assert uniform[0] == 0 and (uniform[1:] / 4000 - 0.2).abs().max() < 0.03
    powers = NestedDropout("powers_of_two", 8).draw(draws).bincount(minlength=9) / 4000
    torch.testing.assert_close(powers, torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1]) / 4, atol=0.03, rtol=0)
    rounded = NestedDropout("rounded_up", 8).draw(draws).bincount(minlength=9) / 4000
    torch.testing.assert_close(rounded[[1, 2, 4, 8]], torch.tensor([1, 1, 2, 4]) / 8, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="1 and 6 must be powers of two"):
        NestedDropout("powers_of_two", 6)
    with pytest.raises(ValueError, match="unknown law of nested dropout 'pow2'"):
        NestedDropout("pow2", 8)


def test_spread_keeps_registers_apart() -> None:
    even = torch.randn(4000, 2, 3)
    assert spread_loss(even) < 0.01 < spread_loss(even + 1) and spread_loss(0.1 * even) > 1
    tokenizer, images = tiny(spread=0.5), images_of(8)
    _, losses = tokenizer.reconstruction_losses(images, Draws(0, range(8)))
    assert losses.total > losses.parts["flow"] and losses.parts["spread"] > 0


def test_stratified_levels_are_spread_over_the_batch() -> None:
    levels = StratifiedLogitNormal().draw(Draws(0, range(64)))
    assert (levels.diff() > 0).float().mean() > 0.9 and levels.max() > 0.85 and levels.min() < 0.15


def test_parts_that_do_not_fit_and_objectives_that_do_not_belong() -> None:
    with pytest.raises(ValueError, match=r"quantizer\.levels is 3, encoder\.out_channels is 2"):
        tiny(quantizer=FSQ(levels=[2, 2, 2]))
    with pytest.raises(ValueError, match=r"null_drop is a probability below 1, got 1\.5"):
        tiny(null_drop=1.5)
    common = {"clip": None, "optimizer": None, "learning_rate": None, "steps": 1, "seed": 0, "ema_decay": None,
              "folder": Path()}
    objective = build(compose_config("train", ["experiment=digits_vq"]).objective)
    with pytest.raises(ValueError, match="FlexTok is trained with objective=null"):
        TokenizerTraining(tokenizer=tiny(), objective=objective, **common)
    with pytest.raises(ValueError, match="KLTokenizer is trained with an objective, such as objective=pixels"):
        TokenizerTraining(tokenizer=tiny().vae, objective=None, **common)


# REPA


@pytest.fixture(scope="module")
def target_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer of timm, with random weights at another image size."""
    path = tmp_path_factory.mktemp("target") / "test_vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0, img_size=96).state_dict(), path)
    return path


def repa_of(target: Target) -> REPA:
    return REPA(target=target, layer=0, width=16, hidden=8, channels=64, grid=4, weight=0.5)


def test_repa_aligns_features_and_leaves_the_target_out_of_checkpoints(target_file: Path) -> None:
    target = Target("test_vit", str(target_file), image_size=64)
    tokenizer = tiny(repa=repa_of(target))
    assert target.features(images_of(2)).shape == (2, 64, 4, 4)
    _, losses = tokenizer.reconstruction_losses(images_of(2), Draws(0, (0, 1)))
    losses.total.backward()
    assert 0 < losses.parts["repa"] < 1 and tokenizer.repa.head[0].weight.grad.any()
    assert tokenizer.decoder.blocks[0].mlp.up.weight.grad.any()
    names = [name for name in tokenizer.state_dict() if name.startswith("repa")]
    assert names and all(name.startswith("repa.head.") for name in names)
    state = tokenizer.state_dict()
    key_map = tokenizer.key_maps()["flextok"]
    back = key_map.to_ours(key_map.to_official(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_without_the_targets_weights_one_learns_where_to_put_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path))
    tokenizer = tiny(repa=repa_of(Target()))  # decodes all the same
    tokenizer.decode(ids_of(1), Draws(0, (0,)))
    with pytest.raises(FileNotFoundError, match=r"vit_large_patch14_dinov2\.lvd142m\.safetensors.*repa=null trains"):
        tokenizer.reconstruction_losses(images_of(1), Draws(0, (0,)))


def test_maps_are_averaged_or_interpolated_to_a_grid() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_grid(maps, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert to_grid(maps, 8).shape == (1, 1, 8, 8) and torch.equal(to_grid(maps, 4), maps)


# Official files


def end_to_end() -> tuple[FlexTok, dict[str, torch.Tensor], dict]:
    case = load_case(GOLDENS / "flextok/end_to_end")
    return tokenizer_of(case, case.inputs["noise"]), case.state_dict, case.config


def test_official_state_dict_survives_the_round_trip() -> None:
    tokenizer, official, _ = end_to_end()
    key_map = tokenizer.key_maps()["flextok"]
    back = key_map.to_official(key_map.to_ours(official))
    tables = {name for name in back if name.endswith(("posemb_module.posembs", "patches_posemb_module.posembs"))}
    assert back.keys() == official.keys() | tables
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name
    wrong = {name: back[name] + 0.1 for name in tables if "enc_" in name}
    with pytest.raises(ValueError, match=r"enc_posemb_module\.posembs .* is not the table"):
        key_map.to_ours(official | wrong)
    with pytest.raises(ValueError, match=r"keys this model does not know: decoder\.other"):
        key_map.to_ours(official | {"decoder.other": torch.zeros(1)})
    heads = {f"decoder.module_dict.dec_repa_head.{name}.weight": torch.zeros(1) for name in ("mlp.0", "out_proj")}
    assert key_map.to_ours(official | heads).keys() == key_map.to_ours(official).keys()


def node_of(image_size: int = 16) -> dict:
    """What the config of the case's tokenizer might assume, wrongly in part."""
    config = compose_config("sample", ["tokenizer=flextok_d12_d12", "checkpoint=none", "tokenizer.vae.width=16",
                                       "tokenizer.vae.multipliers=[1,1]", "tokenizer.vae.blocks_per_level=1",
                                       "tokenizer.encoder.width=64", "tokenizer.decoder.width=64",
                                       f"tokenizer.vae.image_size={image_size}", "+tokenizer.vae.norm_groups=8"])
    return config.tokenizer


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_says_what_it_is_and_where_the_config_was_wrong(tmp_path: Path, caplog, beside: bool) -> None:
    expected, official, tree = end_to_end()
    tree = {name: value for name, value in tree.items() if not name.startswith("_")}
    header = None if beside else {name: repr(value) for name, value in tree.items()}
    save_file(official, tmp_path / "model.safetensors", metadata=header)
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(tree))
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path / "model.safetensors", node_of())
    assert "decoder.depth is 3, where the config assumes 12" in caplog.text
    assert "vae.scale is 0.8, where the config assumes 1.0" in caplog.text
    assert "quantizer.levels" not in caplog.text  # as assumed
    images, draws = load_case(GOLDENS / "flextok/end_to_end").inputs["images"], Draws(0, (0, 1))
    ids = tokenizer.encode(images)
    assert torch.equal(ids, expected.encode(images))
    options = {"steps": 2, "guidance": named_guidance("APG 3")}
    torch.testing.assert_close(tokenizer.decode(ids, draws, **options), expected.decode(ids, draws, **options))


def test_files_that_compute_something_else_are_refused_and_unknowns_reported(tmp_path: Path, caplog) -> None:
    _, official, tree = end_to_end()
    modules = tree["decoder"]["module_dict"]
    modules["dec_to_patches"]["use_mup_readout"] = True
    modules["dec_new"] = {"_target_": "flextok.model.Strange"}
    with pytest.raises(ValueError, match=r"dec_to_patches\.use_mup_readout is True, here False; .*dec_new is a "
                                         r"flextok\.model\.Strange.*wrong images"):
        settings(tree)
    modules["dec_to_patches"]["use_mup_readout"] = False
    del modules["dec_new"]
    modules["dec_transformer"]["softcap"] = 30
    assert any("dec_transformer.softcap=30 is not known" in remark for remark in settings(tree)[1])
    dropout = modules.pop("dec_nested_dropout")
    assert any("in another order" in problem for problem in _problems(tree, dropout))
    save_file(official, tmp_path / "model.safetensors")
    wrong = pytest.raises(ValueError, match=r"FlexTok")
    with caplog.at_level(logging.WARNING), wrong:
        load_tokenizer(tmp_path / "model.safetensors", node_of())
    assert "carries no configuration, and no config.json lies beside it" in caplog.text


def _problems(tree: dict, dropout: dict) -> list[str]:
    from varzoo.tokenizers.flextok.official import check

    modules = tree["decoder"]["module_dict"]
    tree["decoder"]["module_dict"] = {**modules, "dec_nested_dropout": dropout}
    return check(tree)[0]


@pytest.mark.parametrize(("name", "encoder", "decoder"), [
    ("flextok_d12_d12", 85, 172), ("flextok_d18_d18", 287, 578), ("flextok_d18_d28", 287, 2170)])
def test_published_sizes(name: str, encoder: float, decoder: float) -> None:
    with torch.device("meta"):
        tokenizer = build(compose_config("sample", [f"tokenizer={name}", "checkpoint=none"]).tokenizer)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert count(tokenizer.encoder) == pytest.approx(encoder, rel=0.01)
    assert count(tokenizer.decoder) == pytest.approx(decoder, rel=0.01)
    assert count(tokenizer.vae) == pytest.approx(84, rel=0.01)
    assert tokenizer.spec == TokenSpec(kind="discrete", shape=(256,), size=64000, prefix_decodes=True)


# The generator


def generator(seed: int = 1, conditioner=None, **spec) -> FlexTokAR:
    torch.manual_seed(seed)
    spec = {"kind": "discrete", "shape": (N,), "size": 12, "prefix_decodes": True} | spec
    model = FlexTokAR(spec=TokenSpec(**spec), conditioner=conditioner or ClassPrefix(num_classes=7, width=32, drop=0.1),
                      width=32, depth=2, heads=2, multiple_of=16, norm_eps=1e-5, token_dropout=0.1,
                      attention_dropout=0.1, mlp_dropout=0.1)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # zero at initialisation: every id alike
    torch.nn.init.normal_(model.positions.weight, std=0.5)
    return model.eval()


def sampler(plan=None, scale: float = 2.0) -> Autoregressive:
    return Autoregressive(guidance=Constant(scale), plan=plan)


@pytest.mark.parametrize("text", [False, True])
def test_cached_decoding_equals_uncached(text: bool) -> None:
    model = generator(conditioner=TextPrefix(length=4, channels=8, width=32, drop=0.1) if text else None)
    condition = Condition.classes(torch.tensor([1, 2, 3]))
    if text:
        condition = Condition.text(torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool))
    decoding = model.begin(condition, draws=Draws(0, range(3)), guidance=Constant(3.0))
    for step in decoding.steps:
        prediction = decoding.predict(step)
        known = decoding.tokens[:, :step.drawn]
        null = model.conditioner.null(condition)
        conditional, unconditional = model(known, condition)[:, -1:], model(known, null)[:, -1:]
        expected = unconditional + 3.0 * (conditional - unconditional)
        torch.testing.assert_close(prediction.logits, expected, atol=5e-5, rtol=1e-4)
        decoding.commit(step, prediction.draw(Draws(0, range(3))).tokens)


def test_a_prefix_is_the_beginning_of_the_whole() -> None:
    model, condition, draws = generator(), Condition.classes(torch.arange(5)), Draws(3, range(5))
    whole = sampler().sample(model, condition, draws)
    for k in (1, 4, N):
        part = sampler(Prefix(k)).sample(model, condition, draws)
        assert torch.equal(part.tokens, whole.tokens[:, :k]) and part.counts.steps == k
    assert whole.counts.steps == N and len(whole.tokens.unique()) > 3
    for k in (0, N + 1):
        with pytest.raises(ValueError, match=f"a prefix has between 1 and 6 tokens, got {k}"):
            sampler(Prefix(k)).sample(model, condition, draws)
    with pytest.raises(ValueError, match="no prefix of discrete sequence 6 of 12 codes decodes"):
        sampler(Prefix(3)).sample(generator(prefix_decodes=False), condition, draws)
    with pytest.raises(ValueError, match="takes no plan, got 3"):
        sampler(3).sample(model, condition, draws)


def test_positions_are_learned_and_the_loss_teaches_them() -> None:
    model = generator()
    batch = Batch(tokens=ids_of(2), condition=Condition.classes(torch.tensor([1, 2])))
    model.loss(batch, Draws(0, (0, 1)), 0.0).total.backward()
    gradient = model.positions.weight.grad.abs().amax(dim=1)
    assert (gradient[:N] > 0).all() and gradient[N] == 0  # the last token is never fed
    state = model.state_dict()
    key_map = model.key_maps()["llamagen"]
    back = key_map.to_ours(key_map.to_official(state))
    assert back.keys() == state.keys()
    with pytest.raises(ValueError, match="FlexTok's generator models discrete sequences"):
        generator(shape=(2, 3), prefix_decodes=False)


def test_a_model_draws_any_number_of_tokens_and_an_image_depends_on_its_index() -> None:
    model = Model(tokenizer=tiny(), generator=generator(), sampler=sampler(Prefix(2)), decode={"steps": 2})
    images, counts = model.sample([1, 2, 3], seed=4)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8 and counts.steps == 2
    alone, _ = model.sample([3], seed=4, samples=range(2, 3))
    assert (alone.int() - images[2:].int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"unknown decode option of FlexTok 'step'\. Did you mean 'steps'"):
        Model(tokenizer=tiny(), generator=generator(), sampler=sampler(), decode={"step": 2})


@pytest.mark.parametrize(("name", "millions"), [("49m", 49), ("85m", 85), ("201m", 201), ("393m", 393), ("679m", 679),
                                                ("1330m", 1330), ("1330m_t2i", 1330)])
def test_sizes_of_the_generator_count_blocks_alone(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build(compose_config("sample", [f"generator=flextok_ar_{name}", "checkpoint=none"]).generator)
    assert sum(p.numel() for p in model.stack.blocks.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# Runs


def test_a_run_is_complete_by_itself_and_draws_as_many_tokens_as_asked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(compose_config("train", ["experiment=smoke_flextok_ar", "samples_every=0"]))  # VAE and tokenizer first
    vae = load_tokenizer(tmp_path / "runs/smoke_kl")
    (tmp_path / "runs/smoke_kl").rename(tmp_path / "gone")
    tokenizer = load_tokenizer(tmp_path / "runs/smoke_flextok")
    assert tokenizer.vae.scale == vae.scale != 1.0  # measured after the VAE's training
    assert all(torch.equal(value, tokenizer.vae.state_dict()[name]) for name, value in vae.state_dict().items())
    assert (tmp_path / "runs/smoke_flextok/vae.safetensors").is_file()
    (tmp_path / "runs/smoke_flextok").rename(tmp_path / "gone too")
    plan = ["++sampler.plan={_target_:varzoo.generators.causal.Prefix,tokens:3}", "decode={steps:1}"]
    images, counts = load(tmp_path / "runs/smoke_flextok_ar", overrides=plan).sample([3, 7])
    assert images.shape == (2, 3, 16, 16) and counts.steps == 3
    from varzoo.cli.drawing import sample
    from varzoo.loading import register_run

    checkpoint, tokenizer_checkpoint = register_run(tmp_path / "runs/smoke_flextok_ar")
    files = ["model=run", f"checkpoint={checkpoint}", f"tokenizer_checkpoint={tokenizer_checkpoint}", "per_class=1"]
    assert sample(compose_config("sample", [*files, "tokens=3", "labels=[3]", "out=a.png"])).is_file()
    with pytest.raises(ValueError, match="between 1 and 8 tokens, got 17"):
        sample(compose_config("sample", [*files, "tokens=17", "labels=[3]"]))


def test_token_counts_are_refused_where_no_prefix_decodes() -> None:
    from varzoo.generators.base import Generator

    grid = TokenSpec(kind="discrete", shape=(2, 2), size=12)
    model: Generator = LlamaGen(spec=grid, conditioner=ClassPrefix(num_classes=2, width=16, drop=0.1), width=16,
                                depth=1, heads=2, multiple_of=8)
    with pytest.raises(ValueError, match="no prefix of discrete grid 2 x 2 of 12 codes decodes"):
        model.begin(Condition.classes(torch.tensor([0])), draws=Draws(0, (0,)), plan=Prefix(2))
