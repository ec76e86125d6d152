"""Prompts to features: cleaning, padding, the cache, and sampling from prompts in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from varzoo.cli.drawing import sample
from varzoo.core.checkpoint import read_config
from varzoo.core.draws import Draws
from varzoo.generators.llamagen import LlamaGen
from varzoo.loading import build, compose_config
from varzoo.samplers import Autoregressive
from varzoo.text import (
    TextEncoder,
    TextFeatures,
    cached_features,
    class_features,
    class_prompts,
    load_features,
    read_prompts,
    save_features,
)
from varzoo.text.cleaning import cleaning

ROOT = Path(__file__).parents[1]
WORDS = ["a", "the", "red", "cat", "dog", "sits", "on", "mat", "handwritten", "digit", "zero", "one", "two", "three"]
CHANNELS, LENGTH = 16, 6
PROMPTS = ["A red cat", "the dog sits on mat", "dog"]  # with the end token 4, 6 and 2 tokens


def make_encoder(folder: Path, *, seed: int = 0, channels: int = CHANNELS, whole: bool = False) -> Path:
    """A T5 of random weights and a tokenizer of a few words, as transformers would save the published ones."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(vocabulary), d_model=channels, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    (T5ForConditionalGeneration if whole else T5EncoderModel)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("t5"))


def load(folder: Path | str, **settings: object) -> TextEncoder:
    return TextEncoder(**{"source": folder, "download": False, "length": LENGTH, "channels": CHANNELS,
                          "padding_side": "left", "clean": "captions", "truncate": False, **settings})


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load(folder)


def reference(folder: Path, words: str) -> Tensor:
    """Features of one prompt that is not padded at all, straight from transformers."""
    ids = torch.tensor([[3 + WORDS.index(word) for word in words.split()] + [1]])
    with torch.no_grad():
        return T5EncoderModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_are_those_of_the_bare_prompt_with_zeros_at_padding(folder: Path, side: str) -> None:
    encoded = load(folder, padding_side=side).encode(PROMPTS)
    assert encoded.features.shape == (3, LENGTH, CHANNELS) and encoded.mask.dtype == torch.bool
    for row, prompt in enumerate(["a red cat", "the dog sits on mat", "dog"]):
        expected = reference(folder, prompt)
        valid = slice(LENGTH - len(expected), None) if side == "left" else slice(len(expected))
        torch.testing.assert_close(encoded.features[row, valid], expected, atol=1e-5, rtol=1e-4)
        assert encoded.mask[row].nonzero().flatten().tolist() == list(range(LENGTH))[valid]
        assert not encoded.features[row, ~encoded.mask[row]].any()


def test_order_and_batches_do_not_matter(encoder: TextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    backwards = encoder.encode(PROMPTS[::-1], batch_size=2)
    assert backwards.prompts == tuple(PROMPTS[::-1])
    torch.testing.assert_close(backwards.features.flip(0), together.features, atol=1e-5, rtol=1e-4)
    assert torch.equal(backwards.mask.flip(0), together.mask)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(alone.features[0], together.features[row], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together.features[0], together.features[1])


def test_training_around_it_changes_nothing(folder: Path, encoder: TextEncoder) -> None:
    trained = torch.nn.ModuleList([load(folder)]).train()[0]
    assert torch.equal(trained.encode(PROMPTS).features, encoder.encode(PROMPTS).features)
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_a_prompt_that_is_too_long_is_refused_or_cut(folder: Path, encoder: TextEncoder) -> None:
    long = "a red cat sits on mat"
    with pytest.raises(ValueError, match=r"prompt 1 \('a red cat sits on mat'\) has 7 tokens, at most 6.*truncate"):
        encoder.encode(["dog", long])
    ids, valid = load(folder, truncate=True).tokenize([long])
    assert ids.tolist() == [[3 + WORDS.index(word) for word in long.split()[:5]] + [1]]  # the end token is kept
    assert valid.all()


def test_what_is_no_list_of_prompts_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="single string 'a cat'"):
        encoder.encode("a cat")
    with pytest.raises(ValueError, match="no prompts"):
        encoder.encode([])


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown padding_side 'lefty'\. Did you mean 'left'"):
        load(folder, padding_side="lefty")
    with pytest.raises(ValueError, match=r"unknown cleaning 'caption'\. Did you mean 'captions'"):
        load(folder, clean="caption")
    with pytest.raises(ValueError, match="16 channels, expected 2048"):
        load(folder, channels=2048)


def test_a_whole_t5_serves_as_well(tmp_path: Path) -> None:
    whole = make_encoder(tmp_path / "whole", whole=True)
    encoded = load(whole).encode(["a red cat"])
    torch.testing.assert_close(encoded.features[0, -4:], reference(whole, "a red cat"), atol=1e-5, rtol=1e-4)


def test_partial_weights_are_never_filled_up_at_random(tmp_path: Path) -> None:
    path = make_encoder(tmp_path / "t5") / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a whole T5 encoder: 1 weights are missing"):
        load(path.parent)


def test_missing_encoders_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text encoder at .*absent: give the folder"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no complete text encoder"):
        load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"not in the local cache.*text_encoder=nobody/t5 downloads it"):
        load("nobody/t5")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched.*copy its files into a folder"):
        load("nobody/t5", download=True)


def test_a_copy_in_the_hubs_cache_is_used_without_a_request(tmp_path: Path, encoder: TextEncoder,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    make_encoder(tmp_path / "models--somebody--t5" / "snapshots" / "0123")
    (tmp_path / "models--somebody--t5" / "refs").mkdir()
    (tmp_path / "models--somebody--t5" / "refs" / "main").write_text("0123")
    requests = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: requests.append(address))
    cached = load("somebody/t5")
    assert torch.equal(cached.encode(PROMPTS).features, encoder.encode(PROMPTS).features)
    assert cached.identity() == {**encoder.identity(), "name": "somebody/t5"}
    assert not requests


def test_without_transformers_one_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers.*pip install 'varzoo\[text\]'"):
        load(folder)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"needs ftfy.*pip install 'varzoo\[text\]'"):
        load(folder)
    with pytest.raises(ImportError, match="needs transformers"):
        load(folder, clean="lowercase")  # which needs no ftfy


@pytest.mark.parametrize(("prompt", "cleaned"), [
    ("A Blue Porsche 356 parked in front of a yellow brick wall.",
     "a blue porsche 356 parked in front of a yellow brick wall."),
    ("see https://www.example.com/cats now", "see now"),
    ("<b>bold</b> &amp; <person> by @someone", "bold person by"),
    ("a cat 猫 — “asleep”", 'a cat - "asleep"'),
    ("my_own_cute_cat_picture.jpg a-b", "a-b"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("jc6640 h2o 1234567 #42 kept 42", "kept 42"),
    ("free shipping, download free: page 12 of 10x20 png images", "of"),
    ("ﬁne “art” ½ price", 'fine "art" price'),
    ("a%20cat+on*a(mat)", "a cat on a mat"),
    ("'quoted'", "quoted"),
    ("epsilon", "ilon"),  # as officially
    ("", ""),
])
def test_captions_are_cleaned(prompt: str, cleaned: str) -> None:
    assert cleaning("captions")(prompt) == cleaned


def test_other_cleanings() -> None:
    assert cleaning("lowercase")("  A Cat, h2o ") == "a cat, h2o"
    assert cleaning("none")("  A Cat") == "  A Cat"


def test_cache_keeps_features_and_says_whose_they_are(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "cache" / "text.safetensors"
    made = cached_features(path, PROMPTS, encoder)
    before = path.stat().st_mtime_ns
    again = cached_features(path, PROMPTS, encoder)
    loaded = load_features(path)
    for features in (again, loaded):
        assert torch.equal(features.features, made.features) and torch.equal(features.mask, made.mask)
        assert features.prompts == tuple(PROMPTS)
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    assert set(load_file(path)) == {"features", "mask"}
    assert read_config(path)["text_features"]["encoder"] == encoder.identity()


def test_the_same_weights_elsewhere_are_the_same_encoder(tmp_path: Path, encoder: TextEncoder) -> None:
    save_features(tmp_path / "c.safetensors", encoder.encode(PROMPTS), encoder.identity())
    copy = load(make_encoder(tmp_path / "copy"))
    assert torch.equal(cached_features(tmp_path / "c.safetensors", PROMPTS, copy).features,
                       encoder.encode(PROMPTS).features)


def test_another_encoders_cache_is_refused_by_name(tmp_path: Path, folder: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "c.safetensors"
    save_features(path, encoder.encode(PROMPTS), encoder.identity())
    before = path.read_bytes()
    other = load(make_encoder(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=f"of text encoder {folder}, not of {tmp_path / 'other'}: hash .* instead of"):
        cached_features(path, PROMPTS, other)
    with pytest.raises(ValueError, match="padding_side left instead of right"):
        cached_features(path, PROMPTS, load(folder, padding_side="right"))
    with pytest.raises(ValueError, match=r"dtype torch.float32 instead of torch.bfloat16"):
        cached_features(path, PROMPTS, load(folder).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"other prompts \(3, beginning with 'A red cat'; asked for 1"):
        cached_features(path, ["dog"], encoder)
    assert path.read_bytes() == before


def test_files_that_hold_no_features_are_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="no text features at"):
        load_features(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must hold features .* got \['weight'\]"):
        load_features(path)
    save_file({"features": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match=r"c.safetensors: .*\[2, 3, 4\] with \[2, 4\]"):
        load_features(path)
    save_file({"features": torch.zeros(1, 3, 4), "mask": torch.ones(1, 3)}, path)  # of other origin, but sound
    assert load_features(path).mask.dtype == torch.bool
    with pytest.raises(ValueError, match="does not say which encoder"):
        cached_features(path, ["a cat"], encoder)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        load_features(path)
    with pytest.raises(ValueError, match=r"kept as \.safetensors"):
        load_features(tmp_path / "c.npz")


def test_prompts_are_read_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  a dög \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dög"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        read_prompts(tmp_path / "absent.txt")


def test_classes_become_prompts(encoder: TextEncoder) -> None:
    names = ["zero", "one", "two", "three"]
    assert class_prompts(names, "a handwritten digit {}")[3] == "a handwritten digit three"
    with pytest.raises(ValueError, match=r"must contain \{\}"):
        class_prompts(names, "a handwritten digit")
    table = class_features(encoder, names, "a handwritten digit {}")
    condition = table.condition(torch.tensor([3, 0, 3]))
    assert (len(table), condition.size) == (4, 3)
    assert torch.equal(condition.features[0], condition.features[2])
    torch.testing.assert_close(condition.features[0], encoder.encode(["a handwritten digit three"]).features[0],
                               atol=1e-5, rtol=1e-4)
    assert torch.equal(condition.mask, table.mask[[3, 0, 3]])


def tiny_generator() -> LlamaGen:
    generator = build(compose_config("sample", [*GENERATOR, "model=llamagen_xl_t2i", "checkpoint=none"]).generator)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


GENERATOR = ["generator.width=32", "generator.depth=1", "generator.heads=2", "generator.multiple_of=16",
             f"generator.conditioner.length={LENGTH}", f"generator.conditioner.channels={CHANNELS}",
             "generator.spec.shape=[2,4]", "generator.spec.size=32"]
TOKENIZER = ["tokenizer.image_size=[4,8]", "tokenizer.width=32", "tokenizer.multipliers=[1,1]",
             "tokenizer.blocks_per_level=1", "tokenizer.z_channels=32", "tokenizer.codebook_size=32"]
TEXT = [f"text.length={LENGTH}", f"text.channels={CHANNELS}"]


def test_a_generator_draws_from_text_and_refuses_features_of_another_width(encoder: TextEncoder) -> None:
    generator = tiny_generator()
    encoded = encoder.encode(PROMPTS)
    sampler = Autoregressive(draw={"temperature": 0})
    tokens = sampler.sample(generator, encoded.condition(torch.arange(3)), Draws(0, (0, 1, 2))).tokens
    assert len({tuple(row.tolist()) for row in tokens}) == 3  # each prompt its own picture
    wide = TextFeatures(features=torch.zeros(1, LENGTH, CHANNELS + 1), mask=torch.ones(1, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"text features must be \[B, 6, 16\].* got \[1, 6, 17\]"):
        sampler.sample(generator, wide.condition(torch.tensor([0])), Draws(0, (0,)))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-conditional LlamaGen and its tokenizer in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    generator = tiny_generator()
    tokenizer = build(compose_config("sample", [*TOKENIZER, "tokenizer=vq16", "checkpoint=none"]).tokenizer)
    for name, module in (("t2i", generator), ("vq", tokenizer)):
        state = module.key_maps()["llamagen"].to_official(module.state_dict())
        torch.save({"model": state}, folder / f"{name}.pt")
    return folder


def command(official: Path, *arguments: str) -> list[str]:
    return [sys.executable, "sample.py", "model=llamagen_xl_t2i", f"checkpoint={official / 't2i.pt'}",
            f"tokenizer_checkpoint={official / 'vq.pt'}", *GENERATOR, *TOKENIZER, *TEXT, "sampler.draw.top_k=0",
            "device=cpu", "per_class=2", *arguments]


def test_prompts_become_a_grid_of_pictures(official: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "grid.png"
    arguments = command(official, f"prompts={tmp_path / 'prompts.txt'}", f"text_encoder={folder}", f"out={out}",
                        f"features={tmp_path / 'cache.safetensors'}")
    process = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"samples: {out}" in process.stdout
    picture = Image.open(out)
    assert picture.width > 2 * 64 and picture.height > 3 * 32  # rows of two, names at their left
    assert load_features(tmp_path / "cache.safetensors").prompts == tuple(PROMPTS)


def in_process(official: Path, *arguments: str) -> Path:
    return sample(compose_config("sample", command(official, *arguments)[2:]))


def test_a_model_without_a_text_encoder_of_its_own_asks_for_one(official: Path, tmp_path: Path) -> None:
    config = compose_config("sample", command(official, f"prompts={tmp_path / 'prompts.txt'}")[2:])
    config.text = None  # as in a run of one's own
    with pytest.raises(ValueError, match="text=t5_xl"):
        sample(config)


def test_a_folder_of_samples_belongs_to_its_prompts(official: Path, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    arguments = [f"prompts={prompts}", f"text_encoder={folder}", f"out={tmp_path / 'pictures'}", "output=folder"]
    prompts.write_text("a red cat\ndog\n")
    pictures = in_process(official, *arguments)
    assert sorted(path.name for path in pictures.glob("*.png")) == [f"{index:06d}.png" for index in range(4)]
    prompts.write_text("a red dog\ncat\n")
    with pytest.raises(ValueError, match="another run"):
        in_process(official, *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give prompts=FILE"),
    (["labels=[3]"], "knows no labels"),
    (["prompts=absent.txt"], "no prompts at absent.txt"),
    (["prompts={prompts}", "text_encoder=./absent"], "no text encoder at ./absent"),
    (["prompts={prompts}", "text_encoder={folder}", "text.channels=8"], "makes features of 16 channels, expected 8"),
    (["prompts={prompts}", "text_encoder={folder}", "text.length=3"], "has 4 tokens, at most 3 fit"),
    (["prompts={prompts}", "text_encoder={folder}", "text.length=5"], r"must be \[B, 6, 16\]"),
    (["features={prompts}"], "kept as .safetensors"),
    (["features=f.safetensors", "text_encoder={folder}"], "without a text encoder"),
])
def test_bad_requests_write_nothing(official: Path, folder: Path, tmp_path: Path, arguments: list[str],
                                    message: str) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "grid.png"
    prompts.write_text("a red cat\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        in_process(official, f"out={out}", *(text.format(prompts=prompts, folder=folder) for text in arguments))
    assert not out.exists()
