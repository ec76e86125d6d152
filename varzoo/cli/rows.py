"""Published rows of the leaderboard: a config under `experiment/leaderboard` each, which names the model and what to
expect of it under which protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig

from varzoo.core.errors import unknown
from varzoo.eval.protocol import EvalProtocol, find_protocol
from varzoo.loading import compose_config, plain

GROUP = "experiment/leaderboard"
METRICS = {"fd": "FID", "inception_score": "IS", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published value, how near a measured one must be, and who published it."""

    value: float
    tolerance: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published row.

    Attributes:
        name: of its config.
        title, family, paper, parameters, tokenizer, steps: what is measured, in words.
        protocol: the evaluator's named protocol.
        asks: fields that the protocol leaves open and the row does not.
        sampled_in: the precision of the official sampling, in words.
        expected: published values by metric.
        note: what else should be known.
    """

    name: str
    title: str
    family: str
    paper: str
    parameters: str
    tokenizer: str
    steps: str
    protocol: str
    sampled_in: str
    expected: Mapping[str, Expected]
    asks: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        for name in self.expected:
            if name not in METRICS:
                raise unknown("published metric", name, METRICS)

    @property
    def asked(self) -> EvalProtocol:
        """The protocol with what the row fixes beside."""
        return replace(find_protocol(self.protocol), **self.asks)


def row_names() -> list[str]:
    """All published rows."""
    folder = resources.files("varzoo.configs") / GROUP
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_row(name: str, overrides: list[str]) -> tuple[Row, DictConfig]:
    """A row, and the config of sampling it. Raises ValueError for an unknown name."""
    if name not in row_names():
        raise unknown("row of the leaderboard", name, row_names())
    try:
        config = compose_config("sample", [f"{GROUP}={name}", *overrides])
    except HydraException as error:
        raise ValueError(f"override={' '.join(overrides)!r} does not fit {name}: {error}.") from error
    node = plain(config.row)
    expected = {metric: Expected(**value) for metric, value in node.pop("expected").items()}
    return Row(name=name, expected=expected, **node), config


@dataclass(frozen=True)
class Verdict:
    """How a measured value compares with the published one."""

    metric: str
    expected: Expected
    measured: float | None
    verdict: str


def verdicts(row: Row, result: Mapping[str, Any]) -> list[Verdict]:
    """One verdict per published value.

    Args:
        row: what was published.
        result: a stored row of results.
    """
    departures = [*result["protocol"]["departures"], *(["the model"] if result["run"].get("override") else [])]
    found = []
    for name, expected in row.expected.items():
        value = result.get(name)
        if value is None:
            verdict = "not measured under this protocol"
        elif departures:
            verdict = f"not comparable: departs in {', '.join(departures)}"
        elif abs(value - expected.value) <= expected.tolerance:
            verdict = "reproduced"
        else:
            verdict = f"not reproduced: off by {value - expected.value:+.4g}"
        found.append(Verdict(METRICS[name], expected, value, verdict))
    return found
