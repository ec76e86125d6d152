"""README and docs speak of what is there: files they link to, configs they name; and every code block of them runs.

Runs and checkpoints that a block names are stand-ins of random weights (`tests/doc_blocks.py`). Trainings on digits run
for two steps, sampling from runs draws a few images; commands that need official files or big data are composed, and
what they compose is built without memory for its weights.
"""

from __future__ import annotations

import argparse
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.doc_blocks import Block, blocks_of, official_file, untrained_run
from tests.test_text import make_encoder
from varzoo.cli import evaluate, options, train, zoo
from varzoo.cli import sample as sampling
from varzoo.configs import list_configs
from varzoo.core.spec import require_same_tokens
from varzoo.data import Digits
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.protocol import find_protocol
from varzoo.hub import PUBLISHED
from varzoo.loading import build, compose_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BRIEFLY = ["steps=2", "batch_size=4", "validate_every=2", "samples_every=0", "+trainer.limit_val_batches=1"]
PLACEHOLDERS = {"FILE", "TARGET", "DRAFTER"}  # files that have no name of their own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configs_exist(page: Path) -> None:
    text, chosen = page.read_text(), r"(?:^|[\s`]){}=([a-z]\w*)(?=[\s`]|$)"  # not keyword arguments in Python code
    text = text.replace("experiment=digits_chain", "")  # of the page about systems outside of varzoo
    for group in ("experiment", "trainer", "objective", "learning_rate"):
        for name in re.findall(chosen.format(group), text, re.MULTILINE):
            compose_config("train", [f"{group}={name}"])
    for group in ("model", "generator", "tokenizer", "sampler"):
        for name in re.findall(chosen.format(group), text, re.MULTILINE):
            compose_config("sample", [f"{group}={name}", "checkpoint=none"])


# --- code blocks ---

@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins of trained runs are kept, for all pages."""
    return tmp_path_factory.mktemp("docs") / "runs"


whole_digits = Digits.__init__


def few_digits(self: Digits, **settings: Any) -> None:
    """The first 160 of a split: enough for every command, and quickly encoded."""
    whole_digits(self, **settings)
    self.labels, self._images = self.labels[:160], self._images[:160]


@pytest.fixture
def workplace(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the blocks of a page run: runs, a folder of images, prompts, a text encoder."""
    runs.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(runs)
    for place in ("train/a", "train/b", "heldout/a", "heldout/b"):
        (tmp_path / "FOLDER" / place).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "FOLDER" / place / "0.png")
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    monkeypatch.setitem(ClassifierFeatures.RECIPES["digits"], "steps", 3)
    monkeypatch.setenv("VARZOO_CACHE", str(runs.parent / "cache"))
    monkeypatch.setattr("varzoo.hub.fetch", lambda name: official_file(
        tmp_path / "fetched.pt", "tokenizer", name.removesuffix("_in1k"), PUBLISHED["flextok_d18_d28_in1k"].layout))
    monkeypatch.setattr(Digits, "__init__", few_digits)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level  # Hydra's entry sets up its own


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "adding_a_system.md"],  # it has its own test
                         ids=lambda page: page.name)
def test_blocks_run(page: Path, runs: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    for name in sorted({name for block in blocks for name in re.findall(r"runs/(digits_\w+)", block.text)}):
        untrained_run(runs, name)
    names: dict[str, Any] = {}
    for block in blocks:
        if block.language == "python":
            run_python(block, names, workplace)
        for words in block.commands if block.language == "bash" else ():
            try:
                run_command(words, monkeypatch)
            except SystemExit as stopped:
                assert not stopped.code, f"{block.where}: {' '.join(words)}: {stopped.code}"


def run_python(block: Block, names: dict[str, Any], workplace: Path) -> None:
    """A block in the namespace of its page; what is too big has a small stand-in of the same kind."""
    text = block.text.replace("flextok_d18_d28", "flextok_tiny")
    if "flan-t5-xl" in text:
        make_encoder(workplace / "flan-t5-xl", channels=2048)
    exec(compile(text, block.where, "exec"), names)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of a shell block in this process, or as much of it as a test can."""
    match words:
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["python", "train.py", *overrides] | ["torchrun", "--nproc-per-node", _, "train.py", *overrides]:
            run_training(tuple(overrides), monkeypatch)
        case ["python", "sample.py", *overrides] if any("=runs/" in override for override in overrides):
            few = ["per_class=1", *(["labels=[3]"] if not {"labels", "output"} & settings(overrides).keys() else [])]
            few += ["sampler.draw.steps=4"] if settings(overrides)["checkpoint"] == "runs/digits_mar" else []
            monkeypatch.setattr(sys, "argv", ["sample.py", *overrides, *few])
            sampling.main()
        case ["python", "sample.py", *overrides]:
            check_sampling(tuple(overrides))
        case ["python", "-m", "varzoo.eval", *arguments] | ["torchrun", "--nproc-per-node", _, "-m", "varzoo.eval",
                                                            *arguments]:
            run_evaluation(arguments)
        case ["varzoo", *arguments]:
            run_zoo(arguments)
        case ["python", script, *arguments] if script.startswith("benchmarks/"):
            check_benchmark(script, arguments, monkeypatch)
        case ["python", "-c", code]:
            exec(code, {})
        case _:
            raise AssertionError(f"no test knows how to run {words}")


def settings(overrides: list[str] | tuple[str, ...]) -> dict[str, str]:
    return dict(override.split("=", 1) for override in overrides)


@cache
def once(overrides: tuple[str, ...]) -> SimpleNamespace:
    """One object per command: what several pages say is run on one of them."""
    return SimpleNamespace(seen=False)


def run_training(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = compose_config("train", list(overrides)), once(overrides)
    assert ("objective" in settings(overrides)) <= (config.generator is None), "objectives train tokenizers"
    alone = config.trainer.accelerator == "cpu" and config.trainer.devices == 1
    if not alone or config.data.train.get("root") not in (None, "FOLDER") \
            or config.batch_size > 64:
        with torch.device("meta"):
            build(config.generator if config.tokenizer is None else config.tokenizer)
    elif not said.seen:
        for needed in (config.tokenizer_checkpoint, config.target_checkpoint):
            if needed is not None:
                untrained_run(Path("runs").resolve(), Path(needed).name)
        warm = ["learning_rate.warmup=0"] if "warmup" in config.learning_rate else []
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides, *BRIEFLY, *warm,
                                          f"run_dir=trained/{len(list(Path('trained').glob('*')))}"])
        train.main()
        said.seen = True


@cache
def check_sampling(overrides: tuple[str, ...]) -> None:
    """What needs official files: its parts fit together, and its files are those that were published for it."""
    config, given = compose_config("sample", list(overrides)), settings(overrides)
    with torch.device("meta"):
        generator = build(config.generator)
        require_same_tokens(build(config.tokenizer).spec, generator.spec)
    if config.drafter is None:
        build(config.sampler).check(generator)
    published = PUBLISHED.get(config.published)
    tokenizer = published and PUBLISHED[published.tokenizer]
    for setting, entry in (("checkpoint", published), ("tokenizer_checkpoint", tokenizer)):
        if given.get(setting, "FILE") not in PLACEHOLDERS:
            assert entry is not None and Path(given[setting]).name == Path(entry.file).name
        assert setting in given or (config.download and entry.repo)


def run_evaluation(arguments: list[str]) -> None:
    parsed = options.parse(arguments)
    if parsed.job in ("score", "build") and (name := parsed.get("protocol")):
        find_protocol(name)
    elif parsed.job == "reproduce":
        assert parsed["reproduce"] in list_configs("experiment/leaderboard")
        assert Path(parsed["checkpoint"]).name == Path(PUBLISHED[parsed["reproduce"]].file).name
    elif parsed.job != "build" and not (parsed.job == "leaderboard" and once(tuple(arguments)).seen):
        once(tuple(arguments)).seen = True
        evaluate.run([*arguments, *(["splits=2"] if parsed.job == "score" else [])])


def run_zoo(arguments: list[str]) -> None:
    parsed = zoo.parser().parse_args(arguments)
    if parsed.command in ("list", "info"):
        zoo.main(arguments)
    elif parsed.command == "convert" and parsed.name:
        assert parsed.source.name == PUBLISHED[parsed.name].file and parsed.name in list_configs("model")


def check_benchmark(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser takes the arguments; nothing is measured."""
    class Parsed(Exception):
        pass

    def parse_args(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    with monkeypatch.context() as patched, pytest.raises(Parsed):
        parse = argparse.ArgumentParser.parse_args
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
