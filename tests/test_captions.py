"""Prompts as token ids: the text tokenizer, and drawing by command with a text-conditional RQ-Transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.test_text import WORDS
from varzoo.cli.drawing import sample
from varzoo.generators.base import Condition
from varzoo.loading import build, compose_config
from varzoo.text import CaptionIds, CaptionTokenizer

LENGTH = 4
SMALL = ["generator.width=32", "generator.body_depth=1", "generator.body_heads=2", "generator.head_depth=1",
         "generator.code_channels=16", f"generator.conditioner.length={LENGTH}", "generator.conditioner.vocabulary=20",
         "generator.spec.shape=[2,3]", "generator.spec.size=12", "generator.spec.depth=2", "tokenizer.image_size=[4,6]",
         "tokenizer.width=32", "tokenizer.multipliers=[1,1]", "tokenizer.blocks_per_level=1",
         "tokenizer.attention_levels=[1]", "tokenizer.z_channels=32", "tokenizer.latent_channels=16",
         "tokenizer.codebook_size=12", "tokenizer.depth=2", f"text.length={LENGTH}"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def load(source: Path | None, **settings: object) -> CaptionTokenizer:
    return CaptionTokenizer(**{"source": source, "length": LENGTH, "padding": "[PAD]", "clean": "lowercase",
                               "truncate": False, **settings})


def test_prompts_become_ids_padded_behind(vocabulary: Path) -> None:
    captions = load(vocabulary.parent).encode(["A red Cat", "dog", "the dog sits zebra"])
    word = {name: 2 + index for index, name in enumerate(WORDS)}
    assert captions.ids.tolist() == [[word["a"], word["red"], word["cat"], 0], [word["dog"], 0, 0, 0],
                                     [word["the"], word["dog"], word["sits"], 1]]
    condition = captions.condition(torch.tensor([1, 1, 0]))
    assert condition.size == 3 and torch.equal(condition.ids, captions.ids[[1, 1, 0]])
    long = "a red cat sits on mat"
    with pytest.raises(ValueError, match=r"prompt 1 \('a red cat sits on mat'\) has 6 tokens, at most 4 fit"):
        load(vocabulary).encode(["dog", long])
    assert load(vocabulary, truncate=True).encode([long]).ids.tolist() == [[word[name] for name in long.split()[:4]]]


def test_bad_files_and_prompts_are_refused(vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give its file, as in text_encoder=tokenizer\.json"):
        load(None)
    with pytest.raises(FileNotFoundError, match="no text tokenizer at"):
        load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer of the tokenizers package"):
        load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"knows no token '<pad>' to pad with: name another, as in text\.padding"):
        load(vocabulary, padding="<pad>")
    with pytest.raises(ValueError, match="single string 'a cat'"):
        load(vocabulary).encode("a cat")
    with pytest.raises(ValueError, match="no prompts were given"):
        load(vocabulary).encode([])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny text-conditional RQ-Transformer and its tokenizer in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    config = compose_config("sample", ["model=rq_650m_t2i", "checkpoint=none", *SMALL])
    generator, tokenizer = build(config.generator), build(config.tokenizer)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    for book in tokenizer.quantizer.codebooks:
        book.vectors.normal_()
    for name, module in (("generator", generator), ("tokenizer", tokenizer)):
        torch.save({"state_dict": module.key_maps()["rqvae"].to_official(module.state_dict())}, folder / f"{name}.pt")
    return folder / "generator.pt", folder / "tokenizer.pt"


def run(files: tuple[Path, Path], *arguments: str) -> Path:
    return sample(compose_config("sample", ["model=rq_650m_t2i", f"checkpoint={files[0]}", "device=cpu",
                                            f"tokenizer_checkpoint={files[1]}", "per_class=2", *SMALL, *arguments]))


def test_prompts_become_pictures(files: tuple[Path, Path], vocabulary: Path, tmp_path: Path) -> None:
    prompts, arguments = tmp_path / "prompts.txt", [f"text_encoder={vocabulary}", "output=folder"]
    prompts.write_text("a red cat\ndog\n")
    folder = run(files, f"prompts={prompts}", *arguments, f"out={tmp_path / 'pictures'}")
    pictures = [Image.open(folder / f"{index:06d}.png").tobytes() for index in range(4)]
    assert len(set(pictures)) == 4
    prompts.write_text("a red cat\nthe dog sits on\n")  # the first prompt's pictures do not depend on the second
    other = run(files, f"prompts={prompts}", *arguments, f"out={tmp_path / 'others'}")
    others = [Image.open(other / f"{index:06d}.png").tobytes() for index in range(4)]
    assert others[:2] == pictures[:2] and others[2:] != pictures[2:]
    with pytest.raises(ValueError, match="another run"):
        run(files, f"prompts={prompts}", *arguments, f"out={tmp_path / 'pictures'}")


@pytest.mark.parametrize(("arguments", "message"), [
    (["prompts={prompts}"], "give its file, as in text_encoder"),
    (["prompts={prompts}", "text_encoder={vocabulary}", "text.length=3"], r"captions must be ids \[B, 4\]"),
    (["prompts={prompts}", "text_encoder={vocabulary}", "features=f.safetensors"], "leave features out"),
    (["labels=[3]"], "knows no labels"),
])
def test_bad_requests(files: tuple[Path, Path], vocabulary: Path, tmp_path: Path, arguments: list[str],
                      message: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(files, f"out={tmp_path / 'grid.png'}", *(text.format(prompts=prompts, vocabulary=vocabulary)
                                                     for text in arguments))


def test_features_and_ids_are_not_mistaken_for_each_other() -> None:
    from_features = build(compose_config("sample", ["generator=llamagen_xl_t2i", "checkpoint=none", "generator.depth=1",
                                                    "generator.width=32", "generator.heads=2"]).generator)
    with pytest.raises(ValueError, match="conditioned on text features, but token ids were given"):
        from_features.check_condition(Condition.captions(torch.zeros(1, 120, dtype=torch.long)))
    small = [setting.replace("vocabulary=20", "vocabulary=5") for setting in SMALL]
    from_ids = build(compose_config("sample", ["model=rq_650m_t2i", "checkpoint=none", *small]).generator)
    with pytest.raises(ValueError, match=r"conditioned on text token ids: give .*, or prompts and the text tokenizer"):
        from_ids.check_condition(Condition.text(torch.zeros(1, LENGTH, 8), torch.ones(1, LENGTH)))
    captions = CaptionIds(ids=torch.full((1, LENGTH), 7), prompts=("cat",))
    with pytest.raises(ValueError, match=r"captions must be ids \[B, 4\] in 0 to 4, got \[1, 4\] with ids 7 to 7"):
        from_ids.check_condition(captions.condition(torch.tensor([0])))
