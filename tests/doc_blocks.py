"""Code blocks of Markdown pages, and stand-ins for the runs and files that they name."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from varzoo.configs import list_configs
from varzoo.core.checkpoint import save_weights
from varzoo.loading import (
    GENERATOR_FILE,
    TOKENIZER_FILE,
    build,
    compose_config,
    load_generator,
    load_tokenizer,
    node_of,
)
from varzoo.training.run import container

LANGUAGES = {"bash", "python", "yaml", "text", "mermaid"}


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line it begins at, its language and text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of every command of a shell block, comments taken off."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page. Raises ValueError for an indented one, or a fence without a known language."""
    found: list[Block] = []
    lines, start = page.read_text().splitlines(), None
    for number, line in enumerate(lines, start=1):
        fence = re.fullmatch(r"```(\w*)", line)
        if fence and start is None:
            if fence[1] not in LANGUAGES:
                raise ValueError(f"{page.name}:{number}: a fence says its language, one of {', '.join(LANGUAGES)}.")
            start, language = number, fence[1]
        elif fence and start is not None:
            found.append(Block(page, start, language, "\n".join(lines[start:number - 1]) + "\n"))
            start = None
        elif start is None and line.startswith("    ") and not lines[number - 2].strip():
            raise ValueError(f"{page.name}:{number}: an indented block has no language; fence it.")
    if start is not None:
        raise ValueError(f"{page.name}:{start}: this fence is not closed.")
    return found


def untrained_run(runs: Path, name: str) -> Path:
    """What `train.py` would leave in `runs/NAME` for an experiment (or one whose name begins so), of random weights."""
    folder = runs / name
    experiment = max((known for known in list_configs("experiment") if name.startswith(known)), key=len)
    config = compose_config("train", [f"experiment={experiment}"])
    if not folder.exists() and config.generator is None:
        tokenizer = build(config.tokenizer)
        save_weights(folder / TOKENIZER_FILE, tokenizer.state_dict(), {"tokenizer": container(config, "tokenizer")})
    elif not folder.exists():
        source = untrained_run(runs, Path(config.tokenizer_checkpoint).name) / TOKENIZER_FILE
        generator, tokenizer = build(config.generator), load_tokenizer(source, config.tokenizer)
        if generator.needs_target:
            target = untrained_run(runs, Path(config.target_checkpoint).name)
            generator.use_target(load_generator(target))
        save_weights(folder / TOKENIZER_FILE, tokenizer.state_dict(), {"tokenizer": node_of(source, config.tokenizer)})
        save_weights(folder / GENERATOR_FILE, generator.state_dict(), {
            "generator": container(config, "generator"), "sampler": container(config, "sampler"),
            "class_names": [str(digit) for digit in range(10)]})
    return folder


def official_file(path: Path, kind: str, name: str, layout: str) -> Path:
    """A file of random weights as an official code would write it."""
    network = build(compose_config("sample", [f"{kind}={name}", "checkpoint=none"])[kind])
    torch.save({"model": network.key_maps()[layout].to_official(network.state_dict())}, path)
    return path
