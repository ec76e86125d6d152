"""D-AR's generator: the transformer and its sampling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.adapters.llamagen import generate
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws, Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, Linspace, Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix
from varzoo.generators.dar import DAR
from varzoo.nn.rotary import line_table, rotate


def build(config: dict[str, Any], state: dict[str, Tensor]) -> DAR:
    conditioner = ClassPrefix(num_classes=config["num_classes"], width=config["dim"],
                              drop=config.get("class_dropout_prob", 0.1))
    model = DAR(spec=TokenSpec(kind="discrete", shape=(config["block_size"],), size=config["vocab_size"]),
                conditioner=conditioner, width=config["dim"], depth=config["n_layer"], heads=config["n_head"],
                multiple_of=config.get("multiple_of", 256), norm_eps=config.get("norm_eps", 1e-5),
                token_dropout=config.get("token_dropout_p", 0.1), attention_dropout=config.get("resid_dropout_p", 0.1),
                mlp_dropout=config.get("ffn_dropout_p", 0.1))
    load_strictly(model, model.key_maps()["llamagen"].to_ours(state), "the golden state dict")
    return model.eval()


@dataclass(frozen=True)
class Interval(Schedule):
    """A schedule up to a step, 1 afterwards: D-AR's `cfg_interval` k ends after step k + 1."""

    schedule: Schedule
    interval: int

    def __call__(self, step: Step) -> float:
        return self.schedule(step) if self.interval < 0 or step.index <= self.interval + 1 else 1.0


def guidance_of(cfg_scale: str | float, interval: int = -1) -> Schedule | None:
    """The official `cfg_scale`, "first,last" or a number; guidance is on if the first is above 1 (or rises from it)."""
    scales = [float(scale) for scale in str(cfg_scale).split(",")]
    if scales[0] < 1 or scales[0] == scales[-1] == 1:
        return None
    return Interval(Linspace(scales[0], scales[1]) if len(scales) > 1 else Constant(scales[0]), interval)


def forward(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict)
    return {"logits": model(case.inputs["tokens"], Condition.classes(case.inputs["labels"]))}


def train(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict).train()
    tokens, condition, uniforms = case.inputs["tokens"], Condition.classes(case.inputs["labels"]), case.inputs["drop_u"]
    draws = RecordedDraws({"drop_condition": Recorded(uniforms, "batch")}, tuple(range(len(tokens))))
    losses = model.loss(Batch(tokens=tokens, condition=condition), draws, 0.0)
    losses.total.backward()
    official = model.key_maps()["llamagen"].to_official(
        {name: parameter.grad for name, parameter in model.named_parameters()})
    logits = model.logits(tokens, condition, uniforms < model.conditioner.drop)
    return {"loss": losses.total, "logits": logits} | {f"grad.{name}": grad for name, grad in official.items()}


def ar_generate(case: Case) -> dict[str, Any]:
    model, condition = build(case.config, case.state_dict), Condition.classes(case.inputs["labels"])
    outputs = {}
    for name, scale in re.findall(r"'(\w+)': cfg_scale='?([\d.,]*\d)", case.meta["call"]):
        tokens, logits, _ = generate(model, condition, guidance_of(scale), Draws(0, range(condition.size)),
                                     temperature=0.0)
        outputs |= {f"tokens_{name}": tokens, f"guided_logits_{name}": logits}
    return outputs


def ar_generate_sampled(case: Case) -> dict[str, Any]:
    model, sampling = build(case.config["model"], case.state_dict), case.config["sampling"]
    draws = RecordedDraws({"token": Recorded(case.inputs["u"], "batch pos")}, tuple(range(len(case.inputs["u"]))))
    guidance = guidance_of(sampling["cfg_scale"], sampling.get("cfg_interval", -1))
    tokens, logits, kept = generate(model, Condition.classes(case.inputs["labels"]), guidance, draws,
                                    temperature=sampling.get("temperature", 1.0), top_k=sampling.get("top_k", 0),
                                    top_p=sampling.get("top_p", 1.0))
    return {"tokens": tokens, "logits": logits, "kept": kept}


def rope(case: Case) -> dict[str, Any]:
    settings = case.config["tokenizer"]
    rows, columns = torch.arange(settings["height"]), torch.arange(settings["width"])
    tables = [line_table(len(side), dim, settings["theta"])
              for side, dim in zip((rows, columns), settings["axes_dim"])]
    row, column = torch.cartesian_prod(rows, columns).unbind(1)
    grid = torch.cat([tables[0][row], tables[1][column]], dim=1)
    line = line_table(case.config["ar"]["seq_len"], case.config["ar"]["head_dim"], case.config["ar"]["base"])
    return {"tok_cos": grid[..., 0], "tok_sin": grid[..., 1],
            "tok_q_rot": rotate(case.inputs["q"].transpose(1, 2), grid).transpose(1, 2),
            "ar_table": line, "ar_x_rot": rotate(case.inputs["x"], line)}


KINDS = {
    "dar/ar_forward": forward,
    "dar/ar_generate": ar_generate,
    "dar/ar_generate_sampled": ar_generate_sampled,
    "dar/ar_train": train,
    "dar/rope": rope,
}
