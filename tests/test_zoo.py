"""Everything the configs name: it composes, it builds, its parts fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from varzoo.configs import list_configs, list_models
from varzoo.core.errors import unknown
from varzoo.core.spec import require_same_tokens
from varzoo.hub import PUBLISHED, fetch
from varzoo.loading import build, compose_config, load

UNPUBLISHED = ("resgen",)  # neither code nor weights, so no official layout


names = list_configs


@pytest.mark.parametrize("name", list_models())
def test_published_models_fit_together(name: str) -> None:
    config = compose_config("sample", [f"model={name}", "checkpoint=none"])
    with torch.device("meta"):
        generator = build(config.generator)
        require_same_tokens(build(config.tokenizer).spec, generator.spec)
    build(config.sampler).check(generator)


@pytest.mark.parametrize("name", names("experiment"))
def test_experiments_fit_together(name: str) -> None:
    config = compose_config("train", [f"experiment={name}"])
    assert config.name == name
    if config.generator is None:
        tokenizer = build(config.tokenizer)
        assert tokenizer.needs_objective == (config.objective is not None)
        build(config.objective or {})
        return
    source = config if config.tokenizer else compose_config("train", [f"experiment={config.tokenizer_experiment}"])
    tokenizer = build(source.tokenizer)
    generator = build(config.generator)
    require_same_tokens(tokenizer.spec, generator.spec)
    build(config.sampler).check(generator)


@pytest.mark.parametrize("group", ["tokenizer", "generator"])
def test_every_size_builds(group: str) -> None:
    for name in names(group):
        config = compose_config("sample", [f"{group}={name}", "checkpoint=none"])[group]
        with torch.device("meta"):
            layouts = build(config).key_maps()
        assert layouts or name.startswith(UNPUBLISHED), name


def test_published_files_belong_to_configs() -> None:
    configs = {*names("model"), *names("tokenizer"), *names("generator")}
    assert {published.config for published in PUBLISHED.values()} <= configs
    with pytest.raises(ValueError, match="mar_b is not on the hub"):
        fetch("mar_b")
    with pytest.raises(ValueError, match=r"unknown published checkpoint 'lamagen_b'\. Did you mean"):
        fetch("lamagen_b")
    tokenizers = {published.tokenizer for published in PUBLISHED.values()} - {None}
    assert tokenizers == {"vq16", "vq16_t2i", "kl16", "dar_v1", "rq_f32", "bae_16", "bae_20", "bae_24"}


def test_published_files_are_fetched_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["tokenizer.width=32", "tokenizer.multipliers=[1,1]", "tokenizer.image_size=32",
             "tokenizer.codebook_size=64", "generator.width=32", "generator.depth=1", "generator.heads=2",
             "generator.spec.size=64"]
    config = compose_config("sample", ["model=llamagen_b", "download=true", *small])
    for name, node in (("llamagen_b", config.generator), ("vq16", config.tokenizer)):
        model = build(node)
        torch.save({"model": model.key_maps()["llamagen"].to_official(model.state_dict())}, tmp_path / f"{name}.pt")
    monkeypatch.setattr("varzoo.loading.fetch", lambda name: tmp_path / f"{name}.pt")
    images, _ = load("llamagen_b", overrides=["download=true", *small]).sample([3])
    assert images.shape == (1, 3, 32, 32)


def test_names_that_are_unknown_or_files_that_are_missing() -> None:
    with pytest.raises(ValueError, match=r"unknown model or run 'mar_x'\. Did you mean 'mar_"):
        load("mar_x")
    with pytest.raises(FileNotFoundError, match=r"give checkpoint=FILE \(checkpoint-last\.pth, linked from"):
        load("mar_b")
    with pytest.raises(FileNotFoundError, match=r"c2i_B_256\.pt of FoundationVision/LlamaGen.*download=true"):
        load("llamagen_b")
    assert list_models("mar_?") == ["mar_b", "mar_h", "mar_l"]
    assert "Choose from: a, b" in str(unknown("letter", "q", "ab"))
