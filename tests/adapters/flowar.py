"""Golden cases of FlowAR, as it stands in Qinyu-Allen-Zhao/DiSA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.adapters.disa import annealed
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.keymap import KeyMap
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Anneal, LinearInSteps
from varzoo.generators.base import Batch, Condition
from varzoo.generators.flowar import FlowAR
from varzoo.generators.units import Scales, to_map, to_tokens
from varzoo.nn.flow import Euler, PiecewiseGrid
from varzoo.nn.flow_transformer import FlowTransformer, flow_transformer_rules
from varzoo.nn.rotary import axial_rows
from varzoo.samplers.autoregressive import Autoregressive

HEAD_DIM = 64  # official heads of the flow network
SIDE = 16  # of the grid that its rotary positions are scaled to


def build_flowar(config: dict[str, Any]) -> FlowAR:
    """A FlowAR from the official constructor's arguments; dropout does not matter here."""
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    assert config["encoder_embed_dim"] == config["decoder_embed_dim"]
    return FlowAR(spec=TokenSpec(kind="continuous", shape=(side, side), size=config["vae_embed_dim"]),
                  num_classes=1000, scales=config["scale"], width=config["encoder_embed_dim"],
                  heads=config["encoder_num_heads"], encoder_depth=config["encoder_depth"],
                  decoder_depth=config["decoder_depth"], mlp_ratio=config["mlp_ratio"],
                  head_width=config["diffloss_w"], head_depth=config["diffloss_d"],
                  head_heads=config["diffloss_w"] // HEAD_DIM, head_block="cross" if config["cross"] else "plain",
                  class_drop=0.1, attention_dropout=0.0, projection_dropout=0.0)


def loaded_flowar(case: Case) -> FlowAR:
    model = build_flowar(case.config)
    load_strictly(model, model.key_maps()["flowar"].to_ours(case.state_dict), "the case")
    return model


def flownet(case: Case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    width = config["model_channels"]
    head = FlowTransformer(channels=config["in_channels"], condition_width=config["z_channels"], width=width,
                           depth=config["num_res_blocks"], heads=width // HEAD_DIM,
                           block="cross" if config["cross"] else "plain")
    load_strictly(head, KeyMap(flow_transformer_rules(head, "", "")).to_ours(case.state_dict), "the case")
    side = round(inputs["x"].shape[1] ** 0.5)
    rows = axial_rows(Scales(sides=(side,)).layout((side, side)).coordinates * (SIDE / side), HEAD_DIM)
    return {"velocity": head(inputs["x"], head.time_vectors(inputs["t"]), head.prepare(inputs["condition"], rows))}


def train_forward(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_flowar(case)
    labels = Condition.classes(inputs["labels"])
    draws = RecordedDraws({
        "time": Recorded(inputs["t"].T, "batch"), "drop_label": Recorded(inputs["label_u"], "batch"),
        "noise": Recorded(inputs["noise"], "batch pos"),
    }, samples=tuple(range(labels.size)))
    tokens, velocities = to_tokens(inputs["latents"]), []
    model.head.register_forward_hook(lambda module, given, output: velocities.append(output))
    total = model.loss(Batch(tokens=tokens, condition=labels), draws, progress=0.0).total
    x_input = model.inputs(model.layout.split(tokens))
    vectors = model.class_vectors(labels, inputs["label_u"] < model.class_drop)
    z, velocity = model.conditions(x_input, vectors), torch.cat(velocities, dim=1)
    return {"x_input": x_input, "z": z[:, :case.outputs["z"].shape[1]], "loss": total[None],
            "velocity": velocity[:, :case.outputs["velocity"].shape[1]]}


@torch.no_grad()
def kv_cache(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_flowar(case).eval()
    condition = Condition.classes(inputs["labels"])
    decoding = model.begin(condition, draws=RecordedDraws({}, samples=tuple(range(condition.size))))
    seen: list[Tensor] = []
    original, bounds = model.head.prepare, model.layout.bounds
    model.head.prepare = lambda z, rows: (seen.append(z), original(z, rows))[1]
    first = model.layout.sizes[0]
    # The case gives what is fed, not what it was made from.
    model.next_input = lambda tokens, index: inputs["x_input"][:, bounds[index][0] - first:bounds[index][1] - first]
    for step in decoding.steps:
        decoding.predict(step)
        decoding.commit(step, torch.zeros(*step.positions.shape, model.spec.size))
    kept = case.outputs["z_cached"].shape[1]
    uncached = model.conditions(inputs["x_input"], model.class_vectors(condition))
    return {"z_cached": torch.cat(seen, dim=1)[:, :kept], "z_uncached": uncached[:, :kept]}


def schedules(case: Case) -> dict[str, Any]:
    steps = Scales(sides=(1, 2, 4, 8, 16)).layout((16, 16)).steps(1, torch.device("cpu"))
    outputs: dict[str, Any] = {"guidance_cfg3": torch.tensor([LinearInSteps(3)(step) for step in steps],
                                                             dtype=torch.float64)}
    outputs |= {f"times_{index}": PiecewiseGrid()(count)[:-1].float()
                for index, count in enumerate(case.inputs["n"].tolist())}
    return outputs | {f"steps_{index}": annealed(Anneal(upper, lower, rounding="flowar"), len(steps))
                      for index, (upper, lower) in enumerate(case.inputs["settings"].tolist())}


@torch.no_grad()
def sample(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_flowar(case).eval()
    labels = Condition.classes(inputs["labels"])
    draws = RecordedDraws({"init_noise": Recorded(inputs["init_noise"], "batch pos")}, tuple(range(labels.size)))
    upper, lower = inputs["flow_upper_steps"].item(), inputs["flow_lower_steps"].item()
    sampler = Autoregressive(guidance=LinearInSteps(inputs["cfg"].item()), draw={
        "steps": Anneal(upper, lower, rounding="flowar"), "solver": Euler(grid=PiecewiseGrid()),
        "guided_times": (0.0, inputs["guidance"].item())})
    return {"tokens": to_map(sampler.sample(model, labels, draws).tokens, model.spec.shape)}


KINDS = {
    "flowar/flownet_plain": flownet,
    "flowar/flownet_cross": flownet,
    "flowar/train_forward": train_forward,
    "flowar/kv_cache": kv_cache,
    "flowar/schedules": schedules,
    "flowar/sample": sample,
    "flowar/sample_disa": sample,
}
