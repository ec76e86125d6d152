"""Runs: real processes, killed and resumed, fed with bad input; for several at once see test_distributed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from varzoo.cli.drawing import place, sample
from varzoo.cli.evaluate import main
from varzoo.core.checkpoint import read_config, read_weights
from varzoo.demo import demo
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.protocol import read_rows
from varzoo.generators.causal import Prefix
from varzoo.generators.masked import ConfidencePlan, MaskPlan
from varzoo.generators.resgen import LevelMaskPlan
from varzoo.loading import Model, build, compose_config, load, register_run
from varzoo.training.callbacks import read_metrics
from varzoo.training.run import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ tokenizer of a few steps."""
    return train(compose_config("train", ["experiment=smoke_vq", f"run_dir={tmp_path_factory.mktemp('vq') / 'run'}"]))


def overrides(folder: Path, tokenizer: Path, *more: str) -> list[str]:
    return ["experiment=smoke_llamagen", f"run_dir={folder}", f"tokenizer_checkpoint={tokenizer}", *more]


@pytest.fixture(scope="session")
def generator_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_run: Path) -> Path:
    """A LlamaGen of a few steps."""
    return train(compose_config("train", overrides(tmp_path_factory.mktemp("llamagen") / "run", tokenizer_run)))


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, check=False)


def weights(folder: Path, name: str = "generator") -> dict[str, torch.Tensor]:
    return read_weights(folder / f"{name}.safetensors")


def test_a_run_leaves_a_folder_that_is_complete_by_itself(generator_run: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "checkpoints/last.ckpt", "samples/step_000006.png", "curve.png",
                 "tokenizer.safetensors", "generator.safetensors"):
        assert (generator_run / name).is_file(), name
    metrics = read_metrics(generator_run / "logs")
    assert metrics["train/loss"] and [step for step, _ in metrics["heldout/loss"]] == [2, 5]
    assert read_config(generator_run / "generator.safetensors")["class_names"] == [str(digit) for digit in range(10)]
    moved = generator_run.rename(tmp_path / "moved")
    try:
        images, counts = load(moved, overrides=["sampler.guidance.scale=3"]).sample([3, 7], seed=1)
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8 and counts.steps == 64
    finally:
        moved.rename(generator_run)


def test_the_demo_runs_for_a_continuous_generator_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    table = demo(["experiment=smoke_mar", "sampler.plan.steps=4", "sampler.draw.steps=3"], per_class=1, scales=(2.0,))
    assert list(table) == ["real held-out images", "trained, guidance 2", "untrained, guidance 2"]
    assert table["real held-out images"].fd < 0.1 * table["trained, guidance 2"].fd
    assert table["real held-out images"].accuracy > 0.97
    scale = read_config(Path("runs/smoke_mar/tokenizer.safetensors"))["tokenizer"]["scale"]
    assert scale != 1.0  # measured after the tokenizer's training
    printed = capsys.readouterr().out.splitlines()
    named = [line.split("  (")[0].strip() for line in printed if line.startswith("  runs/")]
    assert len(named) == 5 and all(Path(name).is_file() for name in named)
    rows = Path("runs/smoke_mar/results.jsonl").read_text()
    assert "fd_digits" in rows and "FID" not in rows
    with Image.open("runs/smoke_mar/digits.png") as picture:
        assert picture.height >= 10 * 64


def test_killed_and_resumed_is_as_if_never_stopped(tmp_path: Path, tokenizer_run: Path) -> None:
    arguments = overrides(tmp_path / "killed", tokenizer_run, "steps=30", "checkpoint_every=1", "samples_every=0")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists():  # killed at whatever step it happens to be
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "generator.safetensors").exists()
    at = torch.load(last, weights_only=True)["iteration"]
    assert 0 < at < 30
    train(compose_config("train", arguments))
    whole = train(compose_config("train", overrides(tmp_path / "whole", tokenizer_run, "steps=30", "samples_every=0")))
    resumed, uninterrupted = weights(tmp_path / "killed"), weights(whole)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    steps = [step for step, _ in read_metrics(tmp_path / "killed" / "logs")["train/loss"]]
    assert steps[-1] == 29


def test_a_finished_run_is_left_alone(generator_run: Path) -> None:
    path = generator_run / "generator.safetensors"
    before = path.stat().st_mtime_ns
    config = OmegaConf.load(generator_run / "config.yaml")
    assert train(config) == generator_run and path.stat().st_mtime_ns == before


def test_an_adversary_takes_its_turn(tmp_path: Path) -> None:
    adversary = ["objective.discriminator={_target_: varzoo.nn.patchgan.PatchGAN, width: 8, depth: 1}",
                 "objective.adversarial_weight=0.5", "objective.adaptive=true", "objective.adversarial_start=2"]
    folder = train(compose_config("train", ["experiment=smoke_vq", f"run_dir={tmp_path / 'run'}", "log_every=1",
                                            "samples_every=0", *adversary]))
    metrics = read_metrics(folder / "logs")
    assert len(metrics["train/loss"]) == 6  # steps of the tokenizer, not of both optimizers
    assert [step for step, _ in metrics["train/adversarial"]] == [2, 3, 4, 5]
    logits = [value for _, value in metrics["train/logits_real"]]
    assert logits[-1] != logits[2]
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(checkpoint["optimizer_states"]) == 2 and checkpoint["iteration"] == 6


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tokenizer_run: Path) -> None:
    config = compose_config("train", overrides(tmp_path / "run", tokenizer_run, "optimizer.lr=1e30", "clip=null"))
    with pytest.raises(FloatingPointError, match=r"loss became nan at step \d.*First to be not finite: weights of "
                                                 r"|loss became (nan|inf) at step \d.*output of stack"):
        train(config)
    (kept,) = (tmp_path / "run").glob("nonfinite_step_*.pt")
    assert set(torch.load(kept, weights_only=True)["batch"]) == {"compressed", "label", "index"}
    assert not (tmp_path / "run" / "generator.safetensors").exists()


def test_folders_of_others_are_refused(generator_run: Path, tmp_path: Path, tokenizer_run: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run: batch_size, data, seed differ.*overwrite=true"):
        train(compose_config("train", overrides(generator_run, tokenizer_run, "seed=1", "batch_size=8")))
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="is not empty and not a run's folder"):
        train(compose_config("train", overrides(tmp_path, tokenizer_run, "overwrite=true")))
    assert (tmp_path / "thesis.txt").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, tokenizer_run: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"tokenizer makes discrete grid 8 x 8 of 128 codes; the generator expects "
                                         r"discrete grid 8 x 8 of 64 codes"):
        train(compose_config("train", overrides(folder, tokenizer_run, "generator.spec.size=64")))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.*never replaced by random weights"):
        train(compose_config("train", overrides(folder, tmp_path / "nowhere", "tokenizer_experiment=null")))
    with pytest.raises(ValueError, match="'solver' does not fit"):
        train(compose_config("train", overrides(folder, tokenizer_run, "+sampler.draw.solver=ddpm")))
    with pytest.raises(ValueError, match=r"order of LlamaGen is fixed, so it takes no plan, got MaskPlan.*plan=null"):
        train(compose_config("train", overrides(folder, tokenizer_run, "sampler.plan={_target_: "
                                                "varzoo.generators.masked.MaskPlan, steps: 8}")))
    assert not folder.exists()


MASK_PLAN = MaskPlan(steps=4)


@pytest.mark.parametrize(("experiment", "plan", "message"), [
    ("llamagen", MASK_PLAN, r"LlamaGen is fixed, so it takes no plan, got MaskPlan\(steps=4.*sampler=categorical.*"
                            r"fits besides: Completion"),
    ("rq", MASK_PLAN, "RQTransformer is fixed, so it takes no plan"),
    ("nar", MASK_PLAN, "NAR is fixed, so it takes no plan"),
    ("dar_stream", MASK_PLAN, r"besides: Prefix\(tokens=\.\.\.\), Completion"),
    ("llamagen", Prefix(3), "so all of it is drawn; it takes no plan, got Prefix"),
    ("flextok_ar", Prefix(300), "a prefix has between 1 and"),
    ("xar", MASK_PLAN, "units of XAR are fixed, so it takes no plan.*plan=null, as in sampler=flow_ode"),
    ("mar", None, r"MAR leaves the number of steps open: give plan=MaskPlan\(steps=\.\.\.\), between 1 and 64"),
    ("himar", MASK_PLAN, None),
    ("resgen", MASK_PLAN, r"give plan=LevelMaskPlan\(steps=\.\.\.\), such as 63, got MaskPlan"),
    ("elm_mlm", Prefix(3), r"MaskedELM leaves the number of steps open: give plan=ConfidencePlan.* got Prefix"),
    ("elm_mlm", LevelMaskPlan(steps=3), r"MaskedELM .* give plan=ConfidencePlan.* got LevelMaskPlan"),
    ("mar", ConfidencePlan(steps=3), r"MAR .* give plan=MaskPlan.* got ConfidencePlan"),
])
def test_a_plan_that_does_not_fit_is_refused_at_composition(experiment: str, plan: object, message: str | None) -> None:
    config = compose_config("train", [f"experiment=smoke_{experiment}", "sampler.plan=null"])
    generator, sampler = build(config.generator), build(config.sampler)
    sampler.plan = plan
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        sampler.check(generator)


def test_another_tokenizers_cache_is_refused(generator_run: Path, tmp_path: Path) -> None:
    other = train(compose_config("train", ["experiment=smoke_vq", f"run_dir={tmp_path / 'other'}", "seed=1",
                                           "samples_every=0"]))
    cache = f"cache={generator_run / 'cache'}"
    with pytest.raises(ValueError, match="another tokenizer"):
        train(compose_config("train", overrides(tmp_path / "run", other, cache)))


def test_sampling_by_command(generator_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    arguments = [f"checkpoint={generator_run}", "labels=[3,7]", "per_class=3", "output=folder", f"out={folder}"]
    done = run("sample.py", *arguments, "batch_size=4", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"samples: {folder}", done.stderr[-2000:]
    assert [path.name for path in sorted(folder.glob("*.png"))] == [f"{index:06d}.png" for index in range(6)]
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    for name in ("000001.png", "000004.png"):
        (folder / name).unlink()
    assert run("sample.py", *arguments, "batch_size=1", cwd=tmp_path).returncode == 0  # resumes, in other batches
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


@pytest.mark.parametrize(("override", "message"), [
    ("labels=[10]", "unknown class id 10: this generator knows 0 to 9"),
    ("output=gif", "unknown output 'gif'"),
    ("precision=int8", "unknown precision 'int8'"),
    ("guidance=0.5", r"guidance scale 0\.5 is below 1"),
])
def test_bad_input_to_sampling(generator_run: Path, tmp_path: Path, override: str, message: str) -> None:
    checkpoint, tokenizer = register_run(generator_run)
    config = compose_config("sample", ["model=run", f"checkpoint={checkpoint}", f"tokenizer_checkpoint={tokenizer}",
                                       f"out={tmp_path / 'out'}", "per_class=1", override])
    with pytest.raises(ValueError, match=message):
        sample(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("generator", ["llamagen", "mar"])
def test_weights_in_bfloat16(generator_run: Path, generator: str) -> None:
    model = load(generator_run)
    if generator == "mar":
        config = compose_config("train", ["experiment=smoke_mar", "sampler.plan.steps=4", "sampler.draw.steps=3"])
        tokenizer = build(compose_config("train", ["experiment=smoke_kl"]).tokenizer)
        model = Model(tokenizer=tokenizer.eval(), generator=build(config.generator).eval(),
                      sampler=build(config.sampler))
    model = place(model, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.generator.parameters()} == {torch.bfloat16}
    images, _ = model.sample([3, 7])
    assert images.shape == (2, 3, 16, 16)


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run("sample.py", "checkpoint=runs/none", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no checkpoint at runs/none")
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_official_files_by_command(generator_run: Path, tmp_path: Path) -> None:
    model = load(generator_run)
    files = {}
    for name, network in (("generator", model.generator), ("tokenizer", model.tokenizer)):
        files[name] = tmp_path / f"official_{name}.pt"
        torch.save({"model": network.key_maps()["llamagen"].to_official(network.state_dict())}, files[name])
    arguments = [f"checkpoint={files['generator']}", f"tokenizer_checkpoint={files['tokenizer']}", "tokenizer=vq_f2",
                 "generator=llamagen_tiny", "sampler=categorical", "guidance=2", "output=npz", "per_class=1"]
    done = run("sample.py", *arguments, f"out={tmp_path / 'a.npz'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("sample.py", f"checkpoint={generator_run}", "guidance=2", "output=npz", "per_class=1",
               f"out={tmp_path / 'b.npz'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "a.npz") as official, np.load(tmp_path / "b.npz") as ours:
        assert (official["arr_0"] == ours["arr_0"]).all() and official["arr_0"].shape == (10, 16, 16, 3)
    wrong = run("sample.py", *arguments[:-4], "generator=mar_tiny", "sampler=diffusion", cwd=tmp_path)
    assert wrong.returncode == 1 and "fits no layout of MAR" in wrong.stderr


# --- scores of runs ---

@pytest.fixture
def classifier(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits' classifier, barely trained."""
    monkeypatch.setitem(ClassifierFeatures.RECIPES["digits"], "steps", 3)
    monkeypatch.setenv("VARZOO_CACHE", str(tmp_path_factory.getbasetemp() / "barely-trained"))


def test_samples_are_scored_during_training(tmp_path: Path, tokenizer_run: Path, classifier: None) -> None:
    folder = train(compose_config("train", overrides(tmp_path / "run", tokenizer_run, "scores=digits", "scores.every=4",
                                                     "scores.per_class=3", "samples_every=0")))
    rows = read_rows(folder / "scores.jsonl")
    assert [row["run"]["step"] for row in rows] == [4, 6]
    assert rows[0]["protocol"]["metric"] == "fd_digits" and rows[0]["protocol"]["reference_type"] == "train"
    logged = read_metrics(folder / "logs")
    assert [value for _, value in logged["scores/fd_digits"]] == pytest.approx([row["fd"] for row in rows], rel=1e-4)
    # the same samples, drawn and scored afterwards
    main(["reference=build", "data=digits_train", "extractor=digits", f"out={tmp_path / 'stats.npz'}"])
    checkpoint, tokenizer = register_run(folder)
    sample(compose_config("sample", ["model=run", f"checkpoint={checkpoint}", f"tokenizer_checkpoint={tokenizer}",
                                     "per_class=3", "output=folder", f"out={tmp_path / 'samples'}", "device=cpu"]))
    row = main([f"samples={tmp_path / 'samples'}", f"reference={tmp_path / 'stats.npz'}", "extractor=digits",
                f"results={tmp_path / 'results.jsonl'}", "splits=2"])
    assert row["fd"] == pytest.approx(rows[-1]["fd"], rel=1e-6)
    assert row["inception_score"] == pytest.approx(rows[-1]["inception_score"], rel=1e-6)


def test_reconstructions_and_the_codebook_they_use(tmp_path: Path, tokenizer_run: Path, classifier: None,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [f"reconstruct={tokenizer_run}", "data=digits", "out=both", "batch_size=90"]
    usage = main(command)
    assert 0 < usage["codebook_usage"] <= 1 <= usage["codebook_perplexity"]
    Path("both/reconstructions/000123.png").unlink()  # as after a kill
    assert {**main(command), "seconds": 0} == {**usage, "seconds": 0}
    row = main(["samples=both/reconstructions", "reference=both/originals", "reference_type=validation",
                "extractor=digits", "also=pairs", "lpips=none"])
    assert row["count"] == 500 and 0 < row["psnr"] < 60 and -1 <= row["ssim"] <= 1
    with pytest.raises(ValueError, match="unknown data set 'digit'"):
        main([f"reconstruct={tokenizer_run}", "data=digit", "out=other"])
