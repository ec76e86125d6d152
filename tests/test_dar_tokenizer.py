"""D-AR's tokenizer: groups and times, prefixes, streaming, official files, bad input."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.test_dar import tiny as tiny_generator
from varzoo.core.checkpoint import read_entry, read_weights
from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.eval.previews import write_previews
from varzoo.loading import Model, build, compose_config, corrected, load_tokenizer
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.base import Tokenizer
from varzoo.tokenizers.dar import DARTokenizer, Segments

SMALL = ["tokenizer=dar_tiny", "checkpoint=none", "tokenizer.encoder.width=64", "tokenizer.contexts.width=64",
         "tokenizer.network.width=64", "tokenizer.encoder.depth=1", "tokenizer.contexts.depth=2",
         "tokenizer.network.depth=2"]


def make(*overrides: str) -> DARTokenizer:
    """A small tokenizer none of whose weights are zero."""
    torch.manual_seed(0)
    model = build(compose_config("sample", [*SMALL, *overrides]).tokenizer)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DARTokenizer:
    return make()


IDS = torch.arange(48).view(3, 16) * 7 % 128
DRAWS = Draws(3, (5, 0, 9))


def test_progress_is_rounded_to_the_nearest_group() -> None:
    segments = Segments(tokens=256, groups=8, group_size=32, shift=2.0)
    progress = torch.linspace(0, 1, 1601)[:-1]
    counts = (segments.starts(progress) // 32).bincount()
    assert counts.tolist() == [100, *[200] * 6, 300]  # the first half as often, the last half as often again
    starts, times = segments.plan(8)
    assert starts == list(range(0, 256, 32)) and times[0] == 0 and times[-1] == 1
    assert times[1:4] == pytest.approx([1 / 15, 1 / 7, 3 / 13])


@torch.no_grad()
def test_contexts_of_a_prefix_never_change(model: DARTokenizer) -> None:
    codes = model.lookup(IDS)
    whole = model.contexts(codes)
    changed = codes.clone()
    changed[:, 8:] += 1
    assert torch.equal(model.contexts(changed)[:, :8], whole[:, :8])
    assert not torch.allclose(model.contexts(changed)[:, 8:], whole[:, 8:], atol=1e-3)
    cache = model.contexts.new_cache(len(IDS))
    pieces = [model.contexts.extended(codes[:, start:end], cache) for start, end in ((0, 3), (3, 4), (4, 16))]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4, 16])
@pytest.mark.parametrize("sizes", [(16,), (1,) * 16, (4, 4, 4, 4), (7, 9)])
def test_a_stream_ends_with_the_decoded_image_to_the_last_bit(model: DARTokenizer, steps: int,
                                                               sizes: tuple[int, ...]) -> None:
    stream = model.stream(DRAWS, steps=steps)
    for part in IDS.split(sizes, dim=1):
        stream.push(part)
    assert stream.done == steps
    assert torch.equal(stream.preview(), model.decode(IDS, DRAWS, steps=steps))


def test_previews_are_decoded_prefixes_and_approach_the_image(model: DARTokenizer) -> None:
    stream, previews = model.stream(DRAWS), []
    for index, part in enumerate(IDS.split(1, dim=1)):
        if stream.push(part):
            previews.append(stream.preview())
            assert torch.equal(previews[-1], model.decode(IDS[:, :index + 1], DRAWS))
    assert len(previews) == 4
    other = IDS.clone()
    other[:, 8:] = 0
    assert torch.equal(model.decode(other[:, :8], DRAWS), previews[1])
    assert torch.equal(model.decode(IDS[:, :11], DRAWS), previews[1])  # an incomplete group has no effect


def test_ragged_prefixes_and_single_images_equal_the_batch(model: DARTokenizer) -> None:
    whole = model.decode(IDS, DRAWS)
    ragged = model.decode([IDS[0, :4], IDS[1], IDS[2, :9]], DRAWS)
    assert torch.allclose(ragged[1], whole[1], atol=1e-5)
    for row, length in enumerate((4, 16, 9)):
        alone = model.decode(IDS[row:row + 1, :length], Draws(3, (DRAWS.samples[row],)))[0]
        assert torch.allclose(ragged[row], alone, atol=1e-5)
    assert not torch.allclose(whole, model.decode(IDS, Draws(4, DRAWS.samples)), atol=0.1)


def test_euler_and_adams_bashforth_differ_and_agree_in_the_limit(model: DARTokenizer) -> None:
    few, many = ((model.decode(IDS, DRAWS, steps=steps, order=1) - model.decode(IDS, DRAWS, steps=steps)).abs().max()
                 for steps in (4, 128))
    assert 0 < many < few


def test_encoding_is_deterministic_and_causal_training_reaches_every_weight() -> None:
    model = make().train()
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    assert torch.equal(model.compress(images), model.encode(images, Draws(0, range(8))))
    reconstructions, losses = model.reconstruction_losses(images, Draws(0, range(8)))
    assert reconstructions.shape == images.shape and set(losses.parts) == {"flow", "vq", "commitment", "perplexity"}
    losses.total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def streaming_model(tokenizer: Tokenizer) -> Model:
    generator = tiny_generator(tokenizer.spec)
    return Model(tokenizer=tokenizer, generator=generator, sampler=Autoregressive())


def test_sampling_with_previews_gives_the_same_images(model: DARTokenizer) -> None:
    zoo, shown = streaming_model(model), []
    plain, counts = zoo.sample([1, 2], seed=4)
    streamed, same = zoo.sample([1, 2], seed=4, preview=shown.append)
    assert torch.equal(plain, streamed) and torch.equal(shown[-1], streamed) and len(shown) == 4
    assert same.steps == counts.steps
    assert shown[0].dtype == torch.uint8 and not torch.equal(shown[0], shown[-1])


def test_a_tokenizer_that_needs_all_tokens_refuses_to_stream() -> None:
    vq = build(compose_config("sample", ["tokenizer=vq_f2", "checkpoint=none"]).tokenizer)
    with pytest.raises(ValueError, match="VQTokenizer paints no previews while tokens are drawn"):
        vq.stream(DRAWS)


def test_previews_are_written_as_strip_and_animation(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    write_previews(tmp_path / "previews", frames, [7, 8])
    with Image.open(tmp_path / "previews" / "000007.png") as strip, \
            Image.open(tmp_path / "previews" / "000008.gif") as animation:
        assert strip.size == (4 * 64, 64) and animation.n_frames == 4 and animation.size == (64, 64)


def test_official_files_say_their_configuration_and_are_never_unpickled_blindly(tmp_path: Path) -> None:
    """A file as the official code writes it: weights under `ema`, and a config object of a class that is not here."""
    module = types.ModuleType("config_util")

    class Config(dict):
        def __init__(self, *arguments: Any, **entries: Any) -> None:
            raise AssertionError("the file's own class must not run")

    Config.__module__, Config.__qualname__ = "config_util", "Config"
    module.Config = Config
    model = make()
    config = dict.__new__(Config)
    dict.update(config, {
        "encoder_patch_size": 4, "num_encoder_layers": 1, "num_decoder_layers": 2, "query_low_rank": True,
        "encoder_dim": 64, "decoder_dim": 64, "vq_dim": 8, "vq_codebook_size": 128, "num_denoising_steps": 4,
        "num_query_groups": 4, "num_all_queries": 16, "queries_per_step": 4, "vq_enable": True, "novelty": 1,
        "sampling_resolution": 16,
        "diff_decoder": {"in_dim": 3, "out_dim": 3, "dim": 64, "cond_dim": 64, "patch_size": 4, "depth": 2,
                         "data_std": 0.6, "time_shift": 2, "mlp_head": False, "share_time_encoding": False}})
    path = tmp_path / "tokenizer.pt"
    sys.modules["config_util"] = module
    try:
        official = model.key_maps()["dar"].to_official(model.state_dict())
        torch.save({"model": {}, "ema": official, "config": config}, path)
    finally:
        del sys.modules["config_util"]
    assert read_entry(path, "config")["vq_dim"] == 8
    assert "patchify.weight" in read_weights(path, entries=("ema", "model"))
    node = compose_config("sample", ["tokenizer=dar_v1", "checkpoint=none"]).tokenizer
    said = corrected(node, path)
    assert said["network"]["width"] == 64 and said["image_size"] == [16, 16]
    loaded = load_tokenizer(path, node)
    assert torch.equal(loaded.decode(IDS, DRAWS), model.decode(IDS, DRAWS))
    state = model.key_maps()["dar"].to_ours(official)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("ids", "message"), [
    (IDS[:, :0], "a prefix has between 1 and 16 tokens, got 0"),
    (IDS[:, :3], "nothing to see before the first 4 tokens"),
    (torch.zeros(3, 17, dtype=torch.int64), "between 1 and 16 tokens, got 17"),
    (IDS + 128, "ids must lie in 0 to 127"),
])
def test_bad_tokens(model: DARTokenizer, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode(ids, DRAWS)


def test_bad_settings(model: DARTokenizer) -> None:
    with pytest.raises(ValueError, match="give draws"):
        model.decode(IDS)
    with pytest.raises(ValueError, match=r"order is 1 .* or 2 .*, got 3"):
        model.decode(IDS, DRAWS, order=3)
    with pytest.raises(ValueError, match="whole number of solver steps, at least 1, got 0"):
        model.decode(IDS, DRAWS, steps=0)
    with pytest.raises(ValueError, match="an image has 16 tokens, but 0 \\+ 17 were pushed"):
        model.stream(DRAWS).push(torch.zeros(3, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="images of 18 x 16 do not split into patches of 4 x 4"):
        make("tokenizer.image_size=[18,16]")
    with pytest.raises(ValueError, match=r"D-AR's parts do not fit: segments\.tokens is 16, encoder\.queries is 8"):
        make("tokenizer.encoder.queries=8")
    with pytest.raises(ValueError, match="multiple of 64"):
        make("tokenizer.network.width=96")
    with pytest.raises(ValueError, match="takes images"):
        model.encode(torch.zeros(1, 3, 8, 8))
    assert replace(model.spec, prefix_decodes=False) == TokenSpec(kind="discrete", shape=(16,), size=128)
