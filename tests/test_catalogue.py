"""The zoo lists itself, knows what a file is, and converts it there and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from varzoo import catalogue, families
from varzoo.cli.zoo import KINDS, main
from varzoo.core.checkpoint import read_config, read_weights
from varzoo.loading import build, load, load_tokenizer

ROOT = Path(__file__).parents[1]


def test_names_by_kind_and_pattern() -> None:
    assert KINDS == catalogue.KINDS
    assert catalogue.names("model", "mar_?") == ["mar_b", "mar_h", "mar_l"]
    assert not any(name.startswith("_") for kind in KINDS for name in catalogue.names(kind))
    assert catalogue.kind_of("kl16") == "tokenizer" and catalogue.kind_of("digits_mar") == "experiment"
    with pytest.raises(ValueError, match=r"unknown name 'kl61'\. Did you mean 'kl16'"):
        catalogue.kind_of("kl61")
    with pytest.raises(ValueError, match="unknown kind"):
        catalogue.names("models")


@pytest.mark.parametrize("model", ["mar_b", "mar_b_disa", "llamagen_xl_t2i_512", "elm_mlm_l", "rq_480m"])
def test_the_generator_of_a_model_is_the_one_that_its_config_builds(model: str) -> None:
    theirs = dict(catalogue.config_of("model", model).generator)
    ours = dict(catalogue.config_of("generator", catalogue.generator_of(model)))
    assert theirs | {"spec": None} == ours | {"spec": None}
    assert str(catalogue.describe("model", model).spec) == str(build(theirs["spec"]))


def test_every_model_has_a_generator() -> None:
    assert {catalogue.generator_of(model) for model in catalogue.names("model")} <= set(catalogue.names("generator"))


@pytest.mark.parametrize("name", ["mar_b", "token_shuffle_b", "dar_l"])
def test_specs_that_configs_state_are_those_of_what_they_build(name: str) -> None:
    assert catalogue.spec_of("generator", name) == catalogue.on_meta("generator", name).spec


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"model": ["mar_b", "xar_b"], "tokenizer": ["kl_f2", "kl16", "vq_f2"], "generator": ["mar_b", "mar_tiny"],
           "sampler": ["diffusion", "categorical"]}
    monkeypatch.setattr(catalogue, "names", lambda kind, pattern="*": few[kind])
    entry = catalogue.describe("generator", "mar_tiny")
    assert entry.parameters == sum(p.numel() for p in build(catalogue.config_of("generator", "mar_tiny")).parameters())
    assert entry.papers[0] == "2406.11838" and "kl_f2" in entry.partners
    assert entry.samplers == ("diffusion",)
    published = catalogue.describe("generator", "mar_b").published
    assert list(published) == ["mar_b"] and published["mar_b"].layout == "mar"
    assert "mar_b" in catalogue.describe("tokenizer", "kl16").partners


def official(kind: str, name: str, layout: str, path: Path) -> dict[str, torch.Tensor]:
    """A file of random weights in an official layout."""
    torch.manual_seed(0)
    network = build(catalogue.config_of(kind, name))
    state = network.key_maps()[layout].to_official(network.state_dict())
    torch.save({"model": state}, path)
    return state


def test_a_file_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    names = {"generator": ["mar_tiny", "xar_tiny", "llamagen_tiny"], "tokenizer": ["kl_f2", "vq_f2"]}
    monkeypatch.setattr(catalogue, "names", lambda kind, pattern="*": names[kind])
    path = tmp_path / "x.pt"
    official("generator", "mar_tiny", "mar", path)
    found = catalogue.identify(path)
    assert [(match.kind, match.name, match.layout) for match in found] == [("generator", "mar_tiny", "mar")]

    state = read_weights(path)
    state["z_proj.bias"] = state["z_proj.bias"][:-1]
    del state["mask_token"]
    torch.save(state, path)
    nearest = catalogue.identify(path)[0]
    assert not nearest.fits and nearest.name == "mar_tiny"
    assert nearest.missing == ("backbone.mask_token",) and nearest.reshaped == ("backbone.token_embed.bias",)
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(path)])
    assert "1 missing: backbone.mask_token" in str(stopped.value) and "generator=mar_tiny" in str(stopped.value)


def test_conversion_is_bijective_and_its_file_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = official("tokenizer", "vq_f2", "llamagen", tmp_path / "official.pt")
    main(["convert", str(tmp_path / "official.pt"), str(tmp_path / "ours.safetensors"), "--name", "vq_f2"])
    assert read_config(tmp_path / "ours.safetensors")["tokenizer"]["_target_"].endswith("VQTokenizer")
    load_tokenizer(tmp_path / "ours.safetensors")
    for suffix in (".pt", ".safetensors"):
        back = tmp_path / f"back{suffix}"
        main(["convert", str(tmp_path / "ours.safetensors"), str(back), "--layout", "llamagen"])
        again = read_weights(back)
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert "written: " in capsys.readouterr().out


def test_a_models_file_carries_what_sampling_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "little.yaml").write_text(
        "# @package _global_\ndefaults:\n  - _self_\n  - override /tokenizer: vq_f2\n"
        "  - override /generator: llamagen_tiny\n  - override /sampler: categorical\n"
        "sampler: {guidance: {scale: 2.5}}\n")
    monkeypatch.setenv("VARZOO_CONFIGS", f"file://{tmp_path / 'configs'}")
    state = official("generator", "llamagen_tiny", "llamagen", tmp_path / "official.pt")
    official("tokenizer", "vq_f2", "llamagen", tmp_path / "vq.pt")
    main(["convert", str(tmp_path / "official.pt"), str(tmp_path / "generator.safetensors"), "--name", "little"])
    main(["convert", str(tmp_path / "vq.pt"), str(tmp_path / "tokenizer.safetensors"), "--name", "vq_f2"])
    assert read_config(tmp_path / "generator.safetensors")["sampler"]["guidance"]["scale"] == 2.5
    alone, together = load(tmp_path), load("little", checkpoint=tmp_path / "official.pt",
                                           tokenizer_checkpoint=tmp_path / "vq.pt")
    assert torch.equal(alone.sample([3])[0], together.sample([3])[0])
    main(["convert", str(tmp_path / "generator.safetensors"), str(tmp_path / "back.pt"), "--layout", "llamagen"])
    again = read_weights(tmp_path / "back.pt")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    monkeypatch.setenv("VARZOO_CONFIGS", str(tmp_path))
    with pytest.raises(ValueError, match="must be pkg://PACKAGE or file://FOLDER"):
        catalogue.names("model")


def test_conversions_that_are_refused(tmp_path: Path) -> None:
    official("tokenizer", "vq_f2", "llamagen", tmp_path / "official.pt")
    for arguments, message in (
            (["official.pt", "ours.pt", "--name", "vq_f2"], "name it ours.safetensors"),
            (["official.pt", "ours.safetensors", "--name", "digits_vq"], "digits_vq names the experiment"),
            (["official.pt", "ours.safetensors", "--name", "kl_f2"], "is not a checkpoint of this KL"),
            (["official.pt", "back.pt", "--layout", "llamagen"], "is no file of ours"),
            (["none.pt", "ours.safetensors", "--name", "vq_f2"], "no checkpoint at")):
        with pytest.raises(SystemExit, match=message):
            main(["convert", *(str(tmp_path / name) if "." in name else name for name in arguments)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["official.pt"]
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="is no file of ours"):
        main(["convert", str(tmp_path / "other.safetensors"), str(tmp_path / "back.pt"), "--layout", "llamagen"])
    main(["convert", str(tmp_path / "official.pt"), str(tmp_path / "ours.safetensors"), "--name", "vq_f2"])
    with pytest.raises(SystemExit, match="unknown layout"):
        main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pt"), "--layout", "mar"])


def test_the_command_line(capsys: pytest.CaptureFixture) -> None:
    main(["list", "kl*", "--kind", "tokenizer"])
    assert capsys.readouterr().out.split()[0] == "tokenizers"
    main(["info", "mar_tiny"])
    printed = capsys.readouterr().out
    assert "continuous grid 8 x 8 of 4 channels" in printed and "none is published" in printed
    assert max(map(len, printed.splitlines())) <= 100
    main(["info", "diffusion"])
    assert "varzoo.samplers.Autoregressive" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing is called 'zzz'"):
        main(["list", "zzz"])
    with pytest.raises(SystemExit, match="unknown tokenizer 'mar_b'"):
        main(["info", "mar_b", "--kind", "tokenizer"])
    with pytest.raises(SystemExit, match="Did you mean 'mar_b'"):
        main(["info", "mar_bb"])


def test_lists_of_what_fits(capsys: pytest.CaptureFixture) -> None:
    main(["list", "mar*", "--fits", "kl_f2"])
    assert capsys.readouterr().out.split() == ["generators", "mar_nano,", "mar_tiny"]
    main(["list", "--fits", "llamagen_tiny", "--kind", "sampler"])
    printed = capsys.readouterr().out
    assert "sjd" in printed and "lantern" in printed and "diffusion" not in printed and "masked" not in printed
    main(["list", "--fits", "flow_sde"])
    assert {"flowar_tiny", "xar_b"} <= set(capsys.readouterr().out.replace(",", "").split())
    main(["list", "--tokens", "continuous grid 8 x 8", "--kind", "tokenizer"])
    assert capsys.readouterr().out.split() == ["tokenizers", "kl_f2"]
    with pytest.raises(SystemExit, match=r"nothing is called 'vq\*' --fits 'kl_f2'"):
        main(["list", "vq*", "--fits", "kl_f2"])
    with pytest.raises(SystemExit, match="is an experiment, which has chosen already"):
        main(["list", "--fits", "digits_mar"])


def test_a_sampler_fits_only_if_its_plan_does() -> None:
    fitting, drafting = catalogue.fitting_samplers(catalogue.on_meta("generator", "llamagen_tiny"))
    assert "categorical" in fitting and "masked" not in fitting and "lantern" in drafting
    assert catalogue.fitting_samplers(catalogue.on_meta("generator", "xar_tiny")) == (("flow_ode", "flow_sde"), ())


def test_pages_rendered_from_the_configs_are_fresh() -> None:
    page, readme = ROOT / "docs" / "matrix.md", ROOT / "README.md"
    assert page.read_text() == families.matrix_page(), f"docs/matrix.md is stale: {families.RENEW}"
    assert readme.read_text() == families.with_tables(readme.read_text()), f"README is stale: {families.RENEW}"
    every = (*families.families("tokenizer"), *families.families("generator"))
    assert all(family.page for family in every)
    assert {name for family in every for name in family.members} == {
        *catalogue.names("tokenizer"), *catalogue.names("generator")}
    with pytest.raises(ValueError, match="has no lines <!-- systems"):
        families.with_tables("# varzoo")


def test_reconstructions_beside_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    official("tokenizer", "vq_f2", "llamagen", tmp_path / "vq.pt")
    given = ["tokenizer=vq_f2", "checkpoint=vq.pt", "lpips=none"]
    main(["recon", "digits", *given, "count=10", "batch_size=4", "out=x.png"])
    printed = capsys.readouterr().out
    scores = re.search(r"10 images +PSNR ([\d.]+) +SSIM (-?[\d.]+) +\(without LPIPS, as asked\)", printed)
    assert scores and 0 < float(scores[1]) < 40 and -1 <= float(scores[2]) <= 1
    with Image.open("x.png") as picture:
        assert picture.height == 2 * (64 + 2) + 2  # a row of originals, one of reconstructions; small ones enlarged

    (tmp_path / "flat").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 50), "red").save(tmp_path / "flat" / f"{name}.png")
    main(["recon", "flat", *given, "count=2"])
    assert "written: recon.png" in capsys.readouterr().out and (tmp_path / "recon.png").is_file()

    (tmp_path / "empty").mkdir()
    for arguments, message in ((["digits", *given, "count=501"], "500 images are there"),
                               (["digits", *given, "count=none"], "count must be a positive whole number"),
                               (["digits", "lpips=none"], "give checkpoint=FILE"),
                               (["digits", *given, "ouut=x"], "unknown setting 'ouut'. Did you mean 'out'"),
                               (["digitz", *given], "unknown data set 'digitz'. Did you mean 'digits'"),
                               (["empty", *given], "holds no images"),
                               (["digits", "tokenizer=vq_f2", "checkpoint=none.pt", "lpips=none"], "no checkpoint")):
        with pytest.raises(SystemExit, match=message):
            main(["recon", *arguments])


def test_lpips_is_left_out_only_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    official("tokenizer", "vq_f2", "llamagen", tmp_path / "vq.pt")
    with pytest.raises(SystemExit, match="no LPIPS weights at"):
        main(["recon", "digits", "tokenizer=vq_f2", f"checkpoint={tmp_path / 'vq.pt'}"])
