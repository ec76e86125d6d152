"""The lpips package's distance."""

from __future__ import annotations

from typing import Any

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.nn.lpips import LPIPS


def lpips(case: Case) -> dict[str, Any]:
    model = LPIPS(case.config["net"])
    # lin{k} and lins.{k} are one tensor, which was filled under its last name.
    state = case.state_dict
    state |= {name.replace("lins.", "lin"): value for name, value in state.items() if name.startswith("lins.")}
    load_strictly(model, model.key_maps()["lpips"].to_ours(state), "golden case")
    a, b = case.inputs["a"], case.inputs["b"]
    unit_a, unit_b = (a + 1) / 2, (b + 1) / 2
    return {"dist": model(a, b), "dist01": model(2 * unit_a - 1, 2 * unit_b - 1), "per_layer": model.per_layer(a, b)}


KINDS = {"eval/lpips_vgg": lpips, "eval/lpips_alex": lpips}
