"""What a number was measured with: a protocol stands beside every value, and its name follows from it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("varzoo", "torch", "torch-fidelity", "numpy")


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """How samples were scored. Values of unequal protocols are not comparable.

    Attributes:
        metric: name of the Fréchet distance: "FID" for the published Inception weights alone, else "fd_EXTRACTOR".
        extractor: name of the feature extractor.
        extractor_hash: hash of its weights.
        count: number of samples.
        labels: how the samples' classes were chosen, such as "balanced" or "random".
        uint8_rule: how the samples became uint8: "round", "half_up", "truncate", or "unknown".
        reference: what the samples are compared with, in words.
        reference_hash: hash of the reference's statistics.
        precision: precision of the feature extraction.
        is_splits: number of splits of the inception score.
        is_formula: how samples are assigned to splits: "shuffled" (torch-fidelity) or "consecutive" (ADM).
    """

    metric: str
    extractor: str
    extractor_hash: str
    count: int
    labels: str
    uint8_rule: str
    reference: str
    reference_hash: str
    precision: str = "float32"
    is_splits: int = 10
    is_formula: str = "shuffled"

    def __post_init__(self) -> None:
        if self.metric == "FID" and self.extractor != "inception":
            raise ValueError(f"a distance of {self.extractor} features is not a FID; call it fd_{self.extractor}.")

    @property
    def hash(self) -> str:
        """Short hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return (f"{self.metric} of {self.count} samples (labels {self.labels}, uint8 {self.uint8_rule}) against "
                f"{self.reference} [{self.reference_hash}], protocol {self.hash}")


def result_row(protocol: EvalProtocol, values: Mapping[str, Any], *, seconds: float,
               run: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a results file: the values with their protocol, what was run, versions and seconds."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return {**values, "protocol": {**asdict(protocol), "hash": protocol.hash}, "run": dict(run), "versions": versions,
            "seconds": round(seconds, 2)}


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines, in one write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
