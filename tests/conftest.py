from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.inception import write_random_inception
from varzoo.data import Digits
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.score import dataset_samples
from varzoo.eval.writers import PNGFolder

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


# --- what several files about evaluation need ---

@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception of random weights."""
    return write_random_inception(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits' classifier is kept, trained once."""
    folder = tmp_path_factory.mktemp("varzoo-cache")
    ClassifierFeatures(dataset="digits", cache_dir=folder)
    return folder


@pytest.fixture(scope="session")
def digits(cache: Path) -> ClassifierFeatures:
    return ClassifierFeatures(dataset="digits", cache_dir=cache)


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `samples`, a run of 60 real digits."""
    monkeypatch.setenv("VARZOO_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    writer = PNGFolder(folder="samples", manifest={"count": 60, "uint8_rule": "round", "label_scheme": "as in the set"})
    batch = next(iter(dataset_samples(Digits(split="train"), batch_size=60)))
    writer.write(batch.images, batch.indices, batch.labels)
    return tmp_path
