"""Two processes and one: trainers, caches and sampling do the same. Real processes, joined by gloo.

All that two processes do here is done by one pair of them, job after job, while this process does the same alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from filelock import FileLock
from omegaconf import DictConfig

import varzoo.training.run
from varzoo.cli.drawing import sample
from varzoo.configs import list_configs
from varzoo.core.checkpoint import read_config, read_weights
from varzoo.data import Digits
from varzoo.loading import GENERATOR_FILE, TOKENIZER_FILE, compose_config, register_run
from varzoo.training.callbacks import read_metrics
from varzoo.training.run import make_trainer, train
from varzoo.training.sharding import FullySharded

ROOT = Path(__file__).parents[1]
PAIR = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
STEPS = 10
# What is not the same at any split of a batch: losses of a batch as a whole (the entropy of its mean, its spread), and
# choices between codes that rounding decides, as where dead codes restart from alike vectors (those: see test_rqvae).
EXCEPT = {"smoke_dar_tokenizer": ["tokenizer.entropy_weight=0"], "smoke_flextok": ["tokenizer.spread=0"],
          "smoke_rqvae": ["batch_size=16", "tokenizer.restart=false"]}
EXPERIMENTS = ROOT / "varzoo" / "configs" / "experiment"
SMOKE = list_configs("experiment", "smoke_*")
GENERATORS = [name for name in SMOKE
              if "override /generator" in (EXPERIMENTS / f"{name.replace('smoke', 'digits')}.yaml").read_text()]
# Sharded: one system for every kind of stack, since gloo is slow at many small tensors.
SHARDED = ["smoke_llamagen", "smoke_rq", "smoke_mar", "smoke_himar", "smoke_flowar", "smoke_resgen", "smoke_vq"]
TRAINED = {"ddp": SMOKE, "fsdp": SHARDED}


class FewDigits(Digits):
    """The first of the digits, in no more than two blocks of a cache."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        count = 100 if self.split == "train" else 40
        self.labels, self._images = self.labels[:count], self._images[:count]


def settings(name: str, folder: Path) -> list[str]:
    """Overrides of an experiment for a comparison: few steps, no pictures, no dropout (its masks differ by rank)."""
    config = compose_config("train", [f"experiment={name}"])
    made = [f"{part}_checkpoint={folder / 'one' / config[f'{part}_experiment']}" for part in ("tokenizer", "target")
            if config[f"{part}_experiment"] is not None]
    without = [f"{name}=0" for part in ("tokenizer", "generator") for name in dropouts(config[part], part)]
    few = [f"data.{split}._target_=tests.test_distributed.FewDigits" for split in ("train", "heldout")]
    return [f"experiment={name}", f"steps={STEPS}", "batch_size=8", "log_every=1", "samples_every=0",
            "validate_every=10", f"checkpoint_every={STEPS}", *few, *made, *without, *EXCEPT.get(name, [])]


def dropouts(node: Any, at: str) -> Iterator[str]:
    """The settings of a node that are rates of dropout."""
    for name, value in node.items() if isinstance(node, DictConfig) else ():
        if name.endswith("dropout"):
            yield f"{at}.{name}"
        yield from dropouts(value, f"{at}.{name}")


def sampling(run: Path, out: Path, *more: str) -> dict[str, Any]:
    return {"sample": str(run), "overrides": ["labels=[3,7]", "per_class=2", "batch_size=2", "output=folder",
                                              f"out={out}", "device=cpu", *more]}


def work(jobs: list[dict[str, Any]], report: Path) -> None:
    """Do the jobs, and write down what fails."""
    torch.set_num_threads(1)
    with patch.object(varzoo.training.run, "plot_curves"):  # half a second each
        for job in jobs:
            begun = time.perf_counter()
            try:
                if "train" in job:
                    train(compose_config("train", job["train"]))
                else:
                    chosen = any(override.startswith("sampler=") for override in job["overrides"])
                    checkpoint, tokenizer = register_run(Path(job["sample"]), own_sampler=not chosen)
                    sample(compose_config("sample", ["model=run", f"checkpoint={checkpoint}",
                                                     f"tokenizer_checkpoint={tokenizer}", *job["overrides"]]))
            except Exception:
                with report.open("a") as file:
                    file.write(f"{job}\n{traceback.format_exc()}\n")
            print(f"{time.perf_counter() - begun:5.1f}", next(iter(job.values())), file=sys.stderr, flush=True)


def together(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Let two new processes do the jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "pair"}
        with (folder / f"rank{rank}.log").open("w") as log:
            pair.append(subprocess.Popen(
                [sys.executable, "-m", "tests.test_distributed", str(folder), str(rank)], cwd=ROOT, stderr=log,
                stdout=log, env=os.environ | {name: str(value) for name, value in place.items()}))
    try:
        assert [process.wait(timeout=600) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process did in `one` and what two did in `ddp`, `fsdp`, ...; made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            do_everything(folder)
    return folder


def do_everything(folder: Path) -> None:
    needs = {name: compose_config("train", [f"experiment={name}"]) for name in SMOKE}
    order = sorted(SMOKE, key=lambda name: (name in GENERATORS, needs[name].target_experiment is not None,
                                            needs[name].tokenizer_experiment is not None))  # what is needed comes first

    def job(name: str, where: str, *more: str) -> dict[str, Any]:
        cache = [f"cache={folder / 'cache' / ('one' if where == 'one' else 'two') / name}"]
        return {"train": [*settings(name, folder), f"run_dir={folder / where / name}", "+trainer.limit_val_batches=1",
                          *cache, *more]}

    alone = [job(name, "one") for name in order]
    alone += [job("smoke_llamagen", "one_then_fsdp", "steps=4", "checkpoint_every=4")]
    pair = [job(name, trainer, f"trainer={trainer}", *PAIR) for trainer, names in TRAINED.items() for name in names]
    pair += [job("smoke_llamagen", "one_then_fsdp", "trainer=fsdp", *PAIR),
             job("smoke_llamagen", "fsdp_then_one", "steps=4", "checkpoint_every=4", "trainer=fsdp", *PAIR),
             job("smoke_llamagen", "no_average", "ema_decay=null", "trainer=fsdp", *PAIR)]
    # Without BatchNorm, which sees each process's own images, an adversary is the same too.
    adversary = ["objective.discriminator={_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 1, kernel_size: 4}",
                 "objective.adversarial_weight=0.5", "objective.adversarial_start=2"]
    alone += [job("smoke_vq", "adversary_one", *adversary)]
    pair += [job("smoke_vq", f"adversary_{trainer}", *adversary, f"trainer={trainer}", *PAIR) for trainer in TRAINED]
    after = [job("smoke_llamagen", "fsdp_then_one"), job("smoke_llamagen", "one_no_average", "ema_decay=null")]
    draws = {name: (name, []) for name in GENERATORS if name != "smoke_drafter"}
    draws |= {"eagle": ("smoke_llamagen", ["sampler=eagle", f"drafter={folder / 'one' / 'smoke_drafter'}"]),
              "sjd": ("smoke_llamagen", ["sampler=sjd"]),
              "cspd": ("smoke_mar", ["sampler=cspd", f"drafter={folder / 'one' / 'smoke_mar'}", "sampler.draw.steps=4",
                                     "sampler.plan.steps=8"])}
    for who, jobs in (("one", after), ("two", pair)):
        jobs += [sampling(folder / "one" / run, folder / "samples" / who / name, *more)
                 for name, (run, more) in draws.items()]
    work(alone, folder / "failed_alone.txt")
    together(pair, folder)
    work(after, folder / "failed_alone.txt")


def failures(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("failed*.txt")))


def result(run: Path) -> Path:
    return run / (GENERATOR_FILE if (run / GENERATOR_FILE).exists() else TOKENIZER_FILE)


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([value for _, value in read_metrics(run / "logs")["train/loss"]], dtype=torch.float64)


def furthest(one: Path, two: Path) -> float:
    """The largest difference of any weight."""
    ours, theirs = read_weights(result(one)), read_weights(result(two))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].is_floating_point())


@pytest.mark.parametrize(("trainer", "experiment"), [(trainer, name) for trainer, names in TRAINED.items()
                                                     for name in names])
def test_two_processes_train_as_one(done: Path, experiment: str, trainer: str) -> None:
    one, two = done / "one" / experiment, done / trainer / experiment
    assert result(two).exists(), failures(done)
    ours, theirs = losses(one), losses(two)
    assert len(ours) == STEPS and ours[-1] != ours[0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    if result(one).name == GENERATOR_FILE:  # in tokenizers Adam makes steps of what is 0 but for rounding
        assert furthest(one, two) < 1e-4  # small gradients' rounding too is scaled up; a step is about 1e-3
        assert read_config(result(two)) == read_config(result(one))


def test_two_processes_write_the_caches_of_one(done: Path) -> None:
    ours, theirs = (files_of(done / "cache" / who) for who in ("one", "two"))
    assert {name.split("/")[0] for name in ours} == set(GENERATORS) and len(GENERATORS) >= 17
    assert theirs == ours, failures(done)


def test_two_processes_draw_the_samples_of_one(done: Path) -> None:
    ours, theirs = (files_of(done / "samples" / who) for who in ("one", "two"))
    ways = {*GENERATORS, "eagle", "sjd", "cspd"} - {"smoke_drafter"}
    assert {name.split("/")[0] for name in ours} == ways, failures(done)
    assert len([name for name in ours if name.endswith(".png")]) == 4 * len(ways)
    assert theirs.keys() == ours.keys() and [name for name in ours if theirs[name] != ours[name]] == []


def files_of(folder: Path) -> dict[str, bytes]:
    """All files by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("run", ["one_then_fsdp", "fsdp_then_one"])
def test_a_run_goes_on_under_another_trainer(done: Path, run: str) -> None:
    resumed, whole = done / run / "smoke_llamagen", done / "one" / "smoke_llamagen"
    assert len(list((resumed / "logs").iterdir())) == 2, failures(done)
    torch.testing.assert_close(losses(resumed), losses(whole), atol=1e-5, rtol=0)
    assert furthest(whole, resumed) < 1e-5


def test_sharded_without_an_average(done: Path) -> None:
    """The exported weights are the model's own; held-out losses are theirs too."""
    one, two = done / "one_no_average" / "smoke_llamagen", done / "no_average" / "smoke_llamagen"
    assert furthest(one, two) < 1e-5 < furthest(one, done / "one" / "smoke_llamagen"), failures(done)
    (step, ours), = read_metrics(one / "logs")["heldout/loss"]
    assert read_metrics(two / "logs")["heldout/loss"] == [(step, pytest.approx(ours, abs=0.2))]


@pytest.mark.parametrize("trainer", list(TRAINED))
def test_an_adversary_is_trained_as_by_one(done: Path, trainer: str) -> None:
    ours, theirs = (read_metrics(done / f"adversary_{who}" / "smoke_vq" / "logs") for who in ("one", trainer))
    for name in ("loss", "adversarial", "discriminator"):
        ours_, theirs_ = (torch.tensor([value for _, value in metrics[f"train/{name}"]]) for metrics in (ours, theirs))
        assert len(ours_) >= STEPS - 2
        torch.testing.assert_close(theirs_, ours_, atol=1e-5, rtol=0)


def test_a_checkpoint_of_shares_is_that_of_one_process(done: Path) -> None:
    """Full tensors under the same names, optimizer states under the same numbers."""
    one, two = (torch.load(done / who / "smoke_llamagen" / "checkpoints" / "last.ckpt", weights_only=True)
                for who in ("one", "fsdp"))
    assert one.keys() == two.keys() and one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    ours, theirs = one["optimizer_states"][0], two["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for number, state in ours["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(theirs["state"][number][name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_killed_processes_resume_as_if_never_stopped(done: Path, tmp_path: Path, trainer: str) -> None:
    """By the command and its own launcher: bit-identical to an uninterrupted run of the same trainer."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *settings("smoke_llamagen", done), f"trainer={trainer}", *PAIR,
               f"run_dir={folder}", f"cache={done / 'cache' / 'one' / 'smoke_llamagen'}", "checkpoint_every=1",
               "+trainer.limit_val_batches=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               cwd=tmp_path, env=environment)
    last = folder / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)  # both at once
    running.wait()
    assert 0 < torch.load(last, weights_only=True)["iteration"] < STEPS
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
                              env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    ours, theirs = (read_weights(run / GENERATOR_FILE) for run in (done / trainer / "smoke_llamagen", folder))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "fsdp"])
def test_every_experiment_composes_with_every_trainer(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that Lightning's trainer would get on a machine with GPUs."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("varzoo.training.run.pl.Trainer", lambda **arguments: given.update(arguments))
    for experiment in list_configs("experiment"):
        given.clear()
        config = compose_config("train", [f"experiment={experiment}", f"trainer={trainer}"])
        make_trainer(config, Path("nowhere"), SimpleNamespace(automatic_optimization=config.generator is not None), [])
        assert given["accelerator"] == ("cpu" if trainer == "cpu" else "gpu"), experiment
        assert given["devices"] == (1 if trainer in ("cpu", "gpu") else -1)
        assert given["precision"] == ("32-true" if trainer == "cpu" else "bf16-mixed")
        kind = {"fsdp": FullySharded, "ddp": str}.get(trainer, str)
        assert isinstance(given["strategy"], kind) and given["max_steps"] == config.steps
        assert given["gradient_clip_val"] == (config.clip if config.generator is not None else None)
        assert given.get("gradient_clip_algorithm") == config.trainer.get("gradient_clip_algorithm")


def main() -> None:
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    work(json.loads((folder / "jobs.json").read_text()), folder / f"failed_{rank}.txt")


if __name__ == "__main__":
    main()
