"""Golden cases of Qinyu-Allen-Zhao/DiSA, on MAR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.adapters.mar import GUIDANCE, loaded_mar
from tests.golden_case import Case
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.steps import ANNEALING, Anneal, Step
from varzoo.generators.base import Condition
from varzoo.generators.masked import MaskPlan
from varzoo.nn.diffusion import Diffusion, spaced_timesteps
from varzoo.nn.patches import unpatchify
from varzoo.nn.solvers import DDIM, DDPM, DPM
from varzoo.samplers import Autoregressive

SOLVERS = {"DiSA": DDPM(clip=950), "DDIM": DDIM(clip=980, strided=True), "DPM_Solver": DPM(), "DPM_Solver++": DPM()}
TABLES = ("betas", "alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")


def annealed(schedule: Anneal, of: int) -> list[int]:
    """The solver steps of every AR step."""
    nowhere = torch.empty(1, 0, dtype=torch.int64)
    return [schedule(Step(index=index, of=of, positions=nowhere, drawn=0, left=1, total=1)) for index in range(of)]


def schedules_mar(case: Case) -> dict[str, Any]:
    return {f"steps_{law}_{row}": annealed(Anneal(upper, lower, law), of)
            for row, (upper, lower, of) in enumerate(case.inputs["settings"].tolist()) for law in ANNEALING}


def respacing(case: Case) -> dict[str, Any]:
    process, inputs = Diffusion.named("cosine", 1000), case.inputs
    solver = SOLVERS["DiSA"]
    outputs: dict[str, Any] = {"train_num_timesteps": [len(process.respaced(range(solver.clip + 1)))]}
    for row, steps in enumerate(inputs["requested_disa"].tolist()):
        outputs[f"disa_{row}"] = solver.respaced(process, steps).timesteps
    for row, steps in enumerate(inputs["requested_default"].tolist()):
        outputs[f"default_{row}"] = spaced_timesteps(steps, 1000)
    for row, steps in enumerate(inputs["requested_ddim"].tolist()):
        outputs[f"ddim_{row}"] = SOLVERS["DDIM"].respaced(process, steps).timesteps
    for row, steps in enumerate(inputs["requested_coef"].tolist()):
        respaced = solver.respaced(process, steps)
        outputs |= {f"{table}_{row}": getattr(respaced, table) for table in TABLES}
    return outputs


def mar_sample(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_mar(case).eval()
    of, length, cfg = inputs["num_iter"].item(), model.spec.length, inputs["cfg"].item()
    arrays = {"order": Recorded(inputs["orders"], "batch"), "init_noise": Recorded(inputs["init_noise"], "batch pos")}
    if "step_noise" in inputs:
        arrays["step_noise"] = Recorded(inputs["step_noise"], "k batch pos")
    guidance = GUIDANCE[str(inputs["cfg_schedule"][0])](cfg)
    solver = SOLVERS[config["diff_sampler"]]
    times: list[Tensor] = []  # that the head was asked for, by AR step
    at = model.head.at
    model.head.at = lambda asked, condition: (times.append(asked), at(asked, condition))[1]
    # A step that draws nothing: one token stays masked.
    predicted_at = torch.zeros(len(inputs["orders"]), length, dtype=torch.int64)
    mask_len, scales = np.ones(of, int), np.full(of, guidance(_nothing_drawn(length)))
    timesteps = torch.full(case.outputs["timesteps"].shape, -1.0, dtype=torch.float64)
    evaluated = np.zeros(of, int)

    def record(progress: Any) -> None:
        step, asked = progress.step, times[-1]
        predicted_at.scatter_(1, step.positions, step.index)
        mask_len[step.index], scales[step.index], evaluated[step.index] = step.left, guidance(step), len(asked)
        timesteps[step.index, :len(asked)] = asked.double()

    law = config["diff_annealing_strategy"].replace("-", "_")
    draw = {"solver": solver, "steps": Anneal(config["diff_upper_steps"], config["diff_lower_steps"], law)}
    if isinstance(solver, DDPM):
        draw["temperature"] = inputs["temperature"].item()
    sampler = Autoregressive(guidance=guidance, plan=MaskPlan(steps=of), draw=draw)
    draws = RecordedDraws(arrays, tuple(range(len(predicted_at))))
    sampled = sampler.sample(model, Condition.classes(inputs["labels"]), draws, callback=record)
    assert sampled.counts.head_evaluations == evaluated.sum()
    outputs = {"tokens": unpatchify(sampled.tokens, config.get("patch_size", 1), model.spec.shape),
               "steps_evaluated": evaluated, "timesteps": timesteps, "predicted_at": predicted_at, "guidance": scales,
               "mask_len": mask_len}
    if isinstance(solver, DPM):
        outputs["M"] = [solver.kept(model.process)]
    return outputs


def _nothing_drawn(length: int) -> Step:
    return Step(index=0, of=1, positions=torch.empty(1, 0), drawn=length - 1, left=1, total=length)


KINDS = {
    "disa/mar_sample_ddim": mar_sample,
    "disa/mar_sample_disa": mar_sample,
    "disa/mar_sample_disa_cosine": mar_sample,
    "disa/mar_sample_dpm": mar_sample,
    "disa/mar_sample_dpmpp": mar_sample,
    "disa/respacing": respacing,
    "disa/schedules_mar": schedules_mar,
}
