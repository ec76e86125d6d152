from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start; two workers share two cores
torch.set_num_threads(1)

DEFAULT_GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--goldens", type=Path, default=DEFAULT_GOLDENS, metavar="DIR",
                     help="folder of golden cases, SYSTEM/CASE/{case.json, io.npz} (default: tests/goldens)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        root = metafunc.config.getoption("--goldens")
        paths = sorted(path.parent for path in root.glob("*/*/case.json"))
        metafunc.parametrize("golden_path", paths, ids=[f"{path.parent.name}/{path.name}" for path in paths])


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
