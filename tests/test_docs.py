"""README and docs speak of what is there: files they link to, configs and commands they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from varzoo.loading import compose_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configs_exist(page: Path) -> None:
    text, chosen = page.read_text(), r"(?:^|[\s`]){}=([a-z]\w*)(?=[\s`]|$)"  # not keyword arguments in Python code
    for group in ("experiment", "trainer", "objective", "learning_rate"):
        for name in re.findall(chosen.format(group), text, re.MULTILINE):
            compose_config("train", [f"{group}={name}"])
    for group in ("model", "generator", "tokenizer", "sampler"):
        for name in re.findall(chosen.format(group), text, re.MULTILINE):
            compose_config("sample", [f"{group}={name}", "checkpoint=none"])


def test_the_readme_names_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert commands == {"demo", "test"} and all(f"\n{command}:" in makefile for command in commands)
