"""Golden cases of Qinyu-Allen-Zhao/DiSA, the schedules."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden_case import Case
from varzoo.core.steps import ANNEALING, Anneal, Step


def annealed(schedule: Anneal, of: int) -> list[int]:
    """The solver steps of every AR step."""
    nowhere = torch.empty(1, 0, dtype=torch.int64)
    return [schedule(Step(index=index, of=of, positions=nowhere, drawn=0, left=1, total=1)) for index in range(of)]


def schedules_mar(case: Case) -> dict[str, Any]:
    return {f"steps_{law}_{row}": annealed(Anneal(upper, lower, law), of)
            for row, (upper, lower, of) in enumerate(case.inputs["settings"].tolist()) for law in ANNEALING}


KINDS = {"disa/schedules_mar": schedules_mar}
