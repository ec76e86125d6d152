"""Golden cases of MarkXCloud/CSpD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.adapters.mar import GUIDANCE, build_mar, loaded_head
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.generators.base import Condition
from varzoo.generators.mar import MAR
from varzoo.generators.masked import MaskPlan, masked_steps
from varzoo.nn.diffusion import Diffusion, spaced_timesteps
from varzoo.nn.patches import unpatchify
from varzoo.nn.solvers import DDPM, Density, Estimate
from varzoo.samplers.continuous import Acceptance, ContinuousSpeculative
from varzoo.samplers.continuous.acceptance import log_density
from varzoo.samplers.continuous.sampler import Speculation, turns


def densities(case: Case) -> tuple[Density, Density]:
    """The draft's and the target's, `[N, C]`."""
    draft, target = (Density(mean=case.inputs[f"{name}_mean"], std=case.inputs[f"{name}_std"],
                             log_std_sum=case.inputs[f"{name}_logstd"]) for name in ("draft", "target"))
    return draft, target


def acceptance_ratio(case: Case) -> dict[str, Any]:
    (draft, target), x, acceptance = densities(case), case.inputs["x"], Acceptance()
    outputs = {"fixed_term": acceptance.log_factor(draft, target).exp(), "q_pdf": log_density(x, draft).exp(),
               "p_pdf": log_density(x, target).exp()}
    for i, tau in enumerate(case.config["taus"]):
        unnormalised = [(-((x - density.mean) / density.std / tau).square().sum(dim=-1) / 2).exp()
                        for density in (draft, target)]
        outputs |= {f"q_unnorm_{i}": unnormalised[0], f"p_unnorm_{i}": unnormalised[1],
                    f"ratio_{i}": Acceptance(tau=tau).log_ratio(x, draft, target).exp()}
    return outputs | {"alpha": acceptance.residual(case.inputs["prop"], draft, target)}


def rejection_resample(case: Case) -> dict[str, Any]:
    """The tokens of the case as those of one image."""
    (draft, target), inputs = densities(case), case.inputs
    acceptance = Acceptance(tau=case.config["temperature"], rounds=case.config["max_tries"])
    ratio = acceptance.log_ratio(inputs["x"], draft, target).exp()
    accepted = ratio > inputs["u_accept"]
    one = [Density(mean=density.mean[None], std=density.std[None], log_std_sum=density.log_std_sum[None])
           for density in (draft, target)]
    drawn = acceptance.replacements(*one, ~accepted[None],
                                    lambda k: (inputs["eps"][k][None], inputs["u_reject"][k][None]))
    return {"ratio": ratio, "accepted": accepted, "resampled": drawn.tokens[0], "tries": drawn.rounds,
            "result": torch.where(accepted[:, None], inputs["x"], drawn.tokens[0])}


@torch.no_grad()
def denoising_trajectory(case: Case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    channels = config["target_channels"]
    head = loaded_head(case, prefix="net.", channels=channels, out_channels=2 * channels,
                       condition_width=config["z_channels"], width=config["width"], depth=config["depth"])
    process = Diffusion.named("cosine", 1000)
    respaced = process.respaced(spaced_timesteps(config["num_sampling_steps"], 1000))
    outputs = {"timestep_map": respaced.timesteps} | {name: getattr(respaced, name) for name in (
        "betas", "alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")}
    for i, run in enumerate(config["runs"]):
        branches = 1 if run["cfg"] == 1 else 2
        condition = inputs[f"z_{i}"].unflatten(0, (branches, -1))

        def network_at(times: Tensor, condition: Tensor = condition, scale: float = run["cfg"]) -> Estimate:
            """Each half of the official batch with a variance, and a path, of its own; epsilon is of the first half."""
            network = head.at(times, condition)

            def estimate(noised: Tensor, k: int) -> tuple[Tensor, Tensor]:
                epsilon, v = network(noised[0], k).chunk(2, dim=-1)
                return epsilon[-1] + scale * (epsilon[0] - epsilon[-1]), v

            return estimate

        noise, steps = inputs[f"noise_{i}"], inputs[f"inter_noise_{i}"]
        solved = DDPM().solve(network_at, process, noise.expand(branches, -1, -1), lambda k: steps[-1 - k],  # noqa: B023
                              steps=config["num_sampling_steps"], temperature=run["temperature"])
        outputs |= {f"sample_{i}": solved.sample.flatten(0, 1), f"mean_{i}": solved.density.mean.flatten(0, 1),
                    f"std_{i}": solved.density.std.flatten(0, 1),
                    f"logstd_sum_{i}": solved.density.log_std_sum.flatten(0, 1)}
    return outputs


def prefill_schedule(case: Case) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for i, row in enumerate(case.config["rows"]):
        steps = list(masked_steps(MaskPlan(steps=row["num_iter"]), torch.arange(row["seq_len"])[None]))
        left, drawn, who, verify, verified = (np.zeros(row["num_iter"], int) for _ in range(5))
        left[:], waiting = 1, 0
        who[:] = np.arange(row["num_iter"]) <= row["num_iter"] * row["ratio"]
        for turn in turns(steps, prefill=row["ratio"], length=row["num_draft"]):
            at, count = turn.step.index, turn.step.positions.shape[1]
            left[at], drawn[at], who[at] = turn.step.left, count, not turn.drafts
            waiting += count * turn.drafts
            if turn.verifies:
                verify[at], verified[at], waiting = 1, waiting, 0
        outputs |= {f"mask_len_{i}": left, f"num_pred_{i}": drawn, f"who_{i}": who, f"verify_{i}": verify,
                    f"num_verified_{i}": verified}
    return outputs


def loaded(case: Case, name: str) -> MAR:
    model = build_mar(case.config[name] | {"class_num": 1000, "norm_layer": f"eps={case.config['norm_eps']}"})
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in case.state_dict.items() if key.startswith(prefix)}
    load_strictly(model, model.key_maps()["mar"].to_ours(state), "the case")
    return model.eval()


def by_position(case: Case, name: str, index: list[Tensor], shape: tuple[int, ...], rounds: bool) -> Tensor:
    """What events drew, as an array over images and positions; nothing is verified twice."""
    events = [case.inputs[f"{name}_{i}"] for i in range(len(index))]
    most = max((len(event) for event in events), default=0) if rounds else 0
    array = torch.ones(*([most] if rounds else []), *shape)
    for event, (image, position) in zip(events, index):
        if rounds:
            array[:len(event), image, position] = event
        else:
            array[image, position] = event
    return array


@torch.no_grad()
def speculative_run(case: Case) -> dict[str, Any]:
    config, inputs, run = case.config, case.inputs, case.config["run"]
    draft, target = loaded(case, "draft"), loaded(case, "target")
    size, length, channels = inputs["noise"].shape
    index = [case.outputs[f"verify_index_{i}"].long() for i in range(len(case.outputs["verify_steps"]))]
    draws = RecordedDraws({
        "order": Recorded(inputs["orders"], "batch"), "init_noise": Recorded(inputs["noise"], "batch pos"),
        "step_noise": Recorded(inputs["inter_noise"].flip(2).movedim(2, 0), "k batch pos"),
        "accept": Recorded(by_position(case, "u_accept", index, (size, length), rounds=False), "batch pos"),
        "proposal": Recorded(by_position(case, "eps", index, (size, length, channels), rounds=True), "round batch pos"),
        "keep_proposal": Recorded(by_position(case, "u_reject", index, (size, length), rounds=True), "round batch pos"),
    }, samples=tuple(range(size)))
    acceptance = Acceptance(tau=config["inner_temperature"], until="batch")
    sampler = ContinuousSpeculative(
        draft=draft, length=run["num_draft"], prefill=config["ratio"], acceptance=acceptance,
        guidance=GUIDANCE[run["cfg_schedule"]](run["cfg"]), plan=MaskPlan(steps=run["num_iter"]),
        draw={"steps": config["draft"]["num_sampling_steps"], "temperature": run["temperature"]})
    sampler.check(target)
    speculation = Speculation(sampler, target, Condition.classes(inputs["labels"]), draws)

    steps = run["num_iter"]
    who = np.arange(steps) <= steps * config["ratio"]
    left = np.ones(steps, int)  # as officially: one token stays marked after the last step, and in steps without any
    after, verify_steps = torch.zeros(steps, size, length, channels), []
    outputs: dict[str, Any] = {}
    for turn in turns(speculation.steps, prefill=config["ratio"], length=run["num_draft"]):
        step = turn.step
        (speculation.draft if turn.drafts else speculation.prefill)(step)
        left[step.index] = step.left
        after[step.index:] = speculation.drafting.tokens
        if turn.verifies:
            i = len(verify_steps)
            verify_steps.append(step.index)
            event = speculation.verify(speculation.block())
            speculation.drafted.clear()
            outputs |= event_outputs(event, i, case, acceptance)
    mask = torch.stack([torch.zeros(size, length).scatter(1, inputs["orders"][:, :count], 1.0) for count in left])
    tokens = unpatchify(speculation.target.tokens, 1, target.spec.shape)
    return outputs | {"tokens": tokens, "who": who, "mask_len": left, "mask_after": mask, "draft_after": after,
                      "verify_steps": verify_steps}


def event_outputs(event: Any, i: int, case: Case, acceptance: Acceptance) -> dict[str, Any]:
    size, count = event.positions.shape
    flat = {"ratio": event.log_ratio.exp(), "accepted": event.accepted, "result": event.tokens}
    for name, density in (("draft", event.draft), ("target", event.target)):
        flat |= {f"{name}_mean": density.mean, f"{name}_std": density.std, f"{name}_logstd": density.log_std_sum}
    outputs = {f"{name}_{i}": value.flatten(0, 1) for name, value in flat.items()}
    images = torch.arange(size).repeat_interleave(count)
    outputs[f"verify_index_{i}"] = torch.stack([images, event.positions.flatten()])
    if f"rounds_{i}" not in case.outputs:
        return outputs

    x = event.draft.mean  # the last solver step adds no noise
    eps = case.inputs[f"eps_{i}"].unflatten(1, (size, count))
    uniforms = case.inputs[f"u_reject_{i}"].unflatten(1, (size, count))
    alone = Acceptance(tau=acceptance.tau).replacements(event.draft, event.target, ~event.accepted,
                                                        lambda k: (eps[k], uniforms[k]))
    rows = torch.stack([eps[k] * event.target.std + event.target.mean for k in range(len(eps))])
    first = rows.gather(0, event.replacements.first.clamp(min=0)[None, ..., None].expand(1, -1, -1, x.shape[-1]))[0]
    kept = event.accepted[..., None]
    return outputs | {
        f"rounds_{i}": event.replacements.rounds, f"first_round_{i}": event.replacements.first.flatten(),
        f"last_round_{i}": event.replacements.last.flatten(),
        f"first_success_{i}": torch.where(kept, x, first).flatten(0, 1),
        f"per_image_{i}": torch.where(kept, x, alone.tokens).flatten(0, 1)}


KINDS = {
    "cspd/acceptance_ratio": acceptance_ratio,
    "cspd/denoising_trajectory": denoising_trajectory,
    "cspd/prefill_schedule": prefill_schedule,
    "cspd/rejection_resample": rejection_resample,
    "cspd/run_cfg1": speculative_run,
    "cspd/run_cfg_linear": speculative_run,
    "cspd/run_multiround": speculative_run,
    "cspd/run_multiround_linear": speculative_run,
}
