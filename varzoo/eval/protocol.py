"""What a number was measured with: a protocol stands beside every value, and its name follows from it.

The field's evaluators differ in more than is said beside their numbers. `PROTOCOLS` holds what each fixes; what a
protocol leaves open is None there. A measurement has a protocol too, with nothing open, and is only given a family's
name if it agrees with what that family fixes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from varzoo.core.errors import unknown

LIBRARIES = ("varzoo", "torch", "torch-fidelity", "numpy")
REFERENCE_TYPES = ("train", "validation", "images", "clips")


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """How samples were scored. Values of unequal protocols are not comparable.

    Attributes:
        metric: name of the Fréchet distance: "FID" (of reconstructions "rFID") for the published Inception weights
            alone, "FVD" for I3D's, else "fd_EXTRACTOR".
        extractor: name of the feature extractor.
        extractor_hash: hash of its weights; of a published file the first digits of its sha256.
        count: number of samples.
        labels: how the samples' classes were chosen, such as "50 per label, sorted" or "random".
        uint8_rule: how the samples became uint8: "round", "half_up", "truncate", "none" (floats), or "unknown".
        reference: what the samples are compared with, in words.
        reference_hash: hash of the reference's statistics.
        family: the named protocol that this is, or "own".
        departures: what of that protocol was departed from, by name.
        image_size: (height, width) of the scored samples.
        resize: what was done to the samples before they became uint8, such as "bicubic from 384".
        extractor_resize: how the extractor makes them its own size.
        reference_type: "train" (statistics of training images), "validation", "clips", or "images" of no stated kind.
        precision: precision of the feature extraction, TF32 off.
        covariance: "unbiased" (divided by n - 1) or "biased" (by n).
        is_splits: number of splits of the inception score.
        is_formula: how samples are assigned to splits: "shuffled" (torch-fidelity) or "consecutive" (ADM).
        manifold: how precision and recall were measured, or "none".
        kid: subsets of the kernel distance, such as "100 x 1000", or "none".
        pairs: how pairs of reconstructions and originals were compared, or "none".
        frames: frames of a clip; 0 for images.
    """

    metric: str | None
    extractor: str | None
    extractor_hash: str | None
    count: int | None
    labels: str | None
    uint8_rule: str | None
    reference: str | None
    reference_hash: str | None
    family: str = "own"
    departures: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    resize: str | None = "none"
    extractor_resize: str | None = "none"
    reference_type: str | None = "images"
    precision: str = "float32"
    covariance: str = "unbiased"
    is_splits: int = 10
    is_formula: str = "shuffled"
    manifold: str | None = "none"
    kid: str | None = "none"
    pairs: str | None = "none"
    frames: int = 0

    def __post_init__(self) -> None:
        if self.metric in ("FID", "rFID") and self.extractor != "inception":
            raise ValueError(f"a distance of {self.extractor} features is not a FID; call it fd_{self.extractor}.")
        if self.metric == "FVD" and self.extractor != "i3d":
            raise ValueError(f"a distance of {self.extractor} features is not an FVD; call it fd_{self.extractor}.")

    @property
    def hash(self) -> str:
        """Short hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The protocol's name, with what was departed from."""
        return self.family + (f", departing in {', '.join(self.departures)}" if self.departures else "")

    def __str__(self) -> str:
        return (f"{self.metric} of {self.count} samples (labels {self.labels}, uint8 {self.uint8_rule}) against "
                f"{self.reference} [{self.reference_type}, {self.reference_hash}], protocol {self.title} [{self.hash}]")


_OPEN: dict[str, Any] = {  # told by a row or by the samples; and metrics that may be added to any protocol
    "labels": None, "uint8_rule": None, "resize": None, "reference": None, "reference_hash": None, "manifold": None,
    "kid": None, "pairs": None}
_INCEPTION: dict[str, Any] = {
    **_OPEN,
    "metric": "FID", "extractor": "inception", "extractor_hash": "6726825d", "extractor_resize": "tf1", "count": 50000,
    "reference_type": "train"}
_VIDEO: dict[str, Any] = {
    **_OPEN, "metric": "FVD", "extractor": "i3d", "extractor_hash": None, "count": 10000, "reference_type": "clips",
    "frames": 16}
PROTOCOLS = {protocol.family: protocol for protocol in (
    # The evaluator of openai/guided-diffusion: LlamaGen, NAR, D-AR, VAR, RAR, TiTok, DiT, PAR.
    EvalProtocol(family="adm", is_formula="consecutive", **{**_INCEPTION, "manifold": "k=3, float16"}),
    # MAR's fork of torch-fidelity: MAR, xAR, Hi-MAR, TokenBridge, CSpD, DiSA.
    EvalProtocol(family="torch_fidelity", **{**_INCEPTION, "labels": "50 per label, sorted", "uint8_rule": "round"}),
    # pytorch-fid and its copies: RQ-Transformer.
    EvalProtocol(family="pytorch_fid", **{**_INCEPTION, "extractor_resize": "half_pixel"}),
    # Reconstructions against the very images they reconstruct: tokenizers. The inception score is ADM's.
    EvalProtocol(family="tokenizer", is_formula="consecutive",
                 **{**_INCEPTION, "metric": "rFID", "reference_type": "validation"}),
    # LARP, NAR: the TorchScript network resizes, floats, covariance divided by n.
    EvalProtocol(family="fvd_larp", extractor_resize="inside", covariance="biased", **{**_VIDEO, "uint8_rule": "none"}),
    # StyleGAN-V, NBP: short side to 224 and the centre.
    EvalProtocol(family="fvd_styleganv", extractor_resize="short_side", **_VIDEO),
    # VideoGPT, TATS: the same network in another wrapping, stretched to 224 x 224.
    EvalProtocol(family="fvd_videogpt", extractor_resize="stretched", **{**_VIDEO, "count": None}),
)}
DERIVED = ("metric", "family", "departures")  # follow from the others, so that they are not compared


def find_protocol(name: str) -> EvalProtocol:
    """A named protocol."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def differences(asked: EvalProtocol, measured: EvalProtocol) -> dict[str, tuple[Any, Any]]:
    """Fields that `asked` fixes and `measured` has otherwise: (asked, measured) by name."""
    pairs = {field.name: (getattr(asked, field.name), getattr(measured, field.name)) for field in fields(asked)
             if field.name not in DERIVED}
    return {name: pair for name, pair in pairs.items() if pair[0] is not None and pair[0] != pair[1]}


def agree(asked: EvalProtocol, measured: EvalProtocol, allowed: Collection[str] = ()) -> EvalProtocol:
    """`measured` under the name of `asked`.

    Args:
        asked: a named protocol, or a row's.
        measured: what was done.
        allowed: fields that may differ; they become the measurement's `departures`.

    Raises:
        ValueError: another field differs, or there is no field of an allowed name.
    """
    comparable = [field.name for field in fields(asked) if field.name not in DERIVED]
    for name in allowed:
        if name not in comparable:
            raise unknown("protocol field to depart from", name, comparable)
    found = differences(asked, measured)
    refused = [f"{name} is {has!r}, the protocol's is {wants!r}" for name, (wants, has) in found.items()
               if name not in allowed]
    if refused:
        names = ",".join(sorted({*found, *allowed}))
        raise ValueError(f"this is not the protocol {asked.family!r}: {'; '.join(refused)}. Its numbers would not be "
                         f"comparable with published ones; to depart from it all the same, say allow={names}.")
    return replace(measured, family=asked.family, departures=tuple(sorted(found)))


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
    """All rows of a file of JSON lines. Raises ValueError naming a line that is none."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is no row of results ({error}).") from error
    return rows
