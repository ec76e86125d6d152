"""Commands answer at once: what is heavy is imported where it is used, and help fits a screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "diffusers", "lightning", "torchvision", "timm")
COMMANDS = [["-m", "varzoo"], *(["-m", "varzoo", name] for name in (
    "list", "info", "check", "convert", "recon", "matrix")), ["sample.py"], ["train.py"], ["-m", "varzoo.eval"]]


def imported(code: str) -> set[str]:
    """The packages that a program has imported in the end."""
    ending = f"{code}\nimport sys; print('imported', *sorted({{name.partition('.')[0] for name in sys.modules}}))"
    printed = subprocess.run([sys.executable, "-c", ending], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(printed.stdout.rpartition("imported ")[2].split())


@pytest.mark.parametrize(("code", "light"), [
    ("import varzoo", (*HEAVY, "torch")), ("import varzoo; varzoo.list_models('xar*')", (*HEAVY, "torch")),
    ("import varzoo; varzoo.load", HEAVY), ("import varzoo.catalogue", HEAVY)])
def test_imports_are_light(code: str, light: tuple[str, ...]) -> None:
    assert not imported(code) & set(light)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_a_screen_and_imports_no_torch(command: list[str]) -> None:
    run = ("import runpy, sys\nsys.argv = {0} + ['--help']\ntry: runpy.{1}({2!r}, run_name='__main__')\n"
           "except SystemExit: pass")
    start, *rest = command
    if start == "-m":
        code = run.format([rest[0], *rest[1:]], "run_module", rest[0])
    else:
        code = run.format([start], "run_path", start)
    printed = subprocess.run([sys.executable, "-c", f"{code}\nassert not {{*{(*HEAVY, 'torch')}}} & {{*sys.modules}}"],
                             check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert 3 < len(printed.splitlines()) <= 40
    assert max(map(len, printed.splitlines())) <= 100
