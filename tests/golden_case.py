"""Golden cases: what a system's official implementation computed, with weights that `fill` regenerates by name."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of the parameter called `name`.

    Matrices and kernels are N(0, 1/fan_in); 1-D norm gains ("weight", "gamma", "scale") 1 + 0.1 N(0, 1); any other
    1-D parameter 0.1 N(0, 1).
    """
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if len(shape) >= 2:
        values = values / math.sqrt(max(1, math.prod(shape[1:])))
    elif name.rsplit(".", 1)[-1] in ("weight", "gamma", "scale"):
        values = 1 + 0.1 * values
    else:
        values = 0.1 * values
    return values.astype(np.float32)


AMPLIFYING = ("_full", "_250")  # ends of such kinds' names


@dataclass(frozen=True)
class Case:
    """One case. `config` is the official constructor's; `inputs` and `outputs` are tensors by name."""

    system: str
    kind: str
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor | np.ndarray]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The official state dict: filled parameters, and the inputs that `kept` names."""
        state = {name: torch.from_numpy(fill(name, tuple(shape))) for name, shape in self.meta["params"]}
        kept = [entry[0] if isinstance(entry, list) else entry for entry in self.meta["kept"]]
        return state | {name: self.inputs[name] for name in kept if name in self.inputs}


def load_case(path: Path) -> Case:
    """Load the folder SYSTEM/CASE; its name is the kind of case, its files say everything else."""
    meta = json.loads((path / "case.json").read_text())
    with np.load(path / "io.npz") as arrays:
        io = {name: arrays[name] for name in arrays.files}
    tensors = {name: value if value.dtype.kind in "US" else torch.from_numpy(value) for name, value in io.items()}
    inputs, outputs = ({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                       for prefix in ("in.", "out."))
    return Case(path.parent.name, path.name, meta, inputs, outputs)


def compare(case: Case, computed: dict[str, Any]) -> None:
    """Assert that every output of the case was computed, within the case's own tolerance.

    Where random weights amplify values over a whole denoising, no error may exceed 3e-4 of the largest value either.
    """
    missing = sorted(set(case.outputs) - set(computed))
    assert not missing, f"{case.system}/{case.kind}: outputs not computed: {missing}"
    for name, expected in case.outputs.items():
        value = computed[name]
        if isinstance(expected, np.ndarray):
            assert sorted(map(str, value)) == sorted(map(str, expected)), name
            continue
        value = torch.as_tensor(value).detach()
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        error = (value.double() - expected.double()).abs()
        allowed = case.meta["atol"] + case.meta["rtol"] * expected.double().abs()
        if case.kind.endswith(AMPLIFYING):
            allowed = allowed.clamp(max=3e-4 * expected.double().abs().max())
        worst = (error - allowed).max().item() if error.numel() else 0.0
        assert worst <= 0, f"{name}: largest error {error.max().item():.3g}, {worst:.3g} beyond the case's tolerance"
