"""NAR on images: orders, masks, the transformer and its sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.adapters.llamagen import generate
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws, Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, FirstTokens, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.nar import NAR
from varzoo.generators.orders import Order
from varzoo.nn.rotary import axial_table, rotate, zero_rows


def build(config: dict[str, Any], state: dict[str, Tensor]) -> NAR:
    side = int(config["block_size"] ** 0.5 + 0.5)
    width, drop = config["dim"], config.get("class_dropout_prob", 0.1)
    if config.get("model_type", "c2i") == "t2i":
        conditioner = TextPrefix(length=config["cls_token_num"], channels=config.get("caption_dim", 2048), width=width,
                                 drop=drop)
    else:
        conditioner = ClassPrefix(num_classes=config["num_classes"], width=width, drop=drop)
    model = NAR(spec=TokenSpec(kind="discrete", shape=(side, side), size=config["vocab_size"]), conditioner=conditioner,
                width=width, depth=config["n_layer"], heads=config["n_head"],
                multiple_of=config.get("multiple_of", 256), norm_eps=config.get("norm_eps", 1e-5),
                token_dropout=config.get("token_dropout_p", 0.1), attention_dropout=config.get("resid_dropout_p", 0.1),
                mlp_dropout=config.get("ffn_dropout_p", 0.1))
    load_strictly(model, model.key_maps()["nar"].to_ours(state), "the golden state dict")
    return model.eval()


def condition_of(case: Case) -> Condition:
    if "caption" in case.inputs:
        return Condition.text(case.inputs["caption"], case.inputs["emb_mask"])
    return Condition.classes(case.inputs["cond"])


def state_of(case: Case) -> dict[str, Tensor]:
    """The official state dict, with the buffer of the null caption, which is an input of text cases."""
    null = {f"cls_embedding.{name}": value for name, value in case.inputs.items() if name == "uncond_embedding"}
    return case.state_dict | null


def guidance_of(scale: float, interval: int) -> Schedule | None:
    if scale <= 1:
        return None
    return Constant(scale) if interval < 0 else FirstTokens(scale, last=interval)


def orders_and_rope(case: Case) -> dict[str, Any]:
    config, outputs, tables = case.config, {}, {}
    for i, side in enumerate(config["grids"]):
        order = Order.shells(1, (side, side))
        turn = order.turn[1:][order.cells.argsort()] - 1
        outputs |= {f"mask_{i}": turn <= turn[:, None], f"step_of_cell_{i}": turn.view(side, side),
                    f"order_{i}": torch.cat([step.positions for step in order.steps]),
                    f"step_sizes_{i}": torch.tensor(order.sizes)}
        for k, prefix in enumerate(config["cls_token_nums"]):
            grid = axial_table((side, side), config["head_dim"], config["rope_base"])
            tables[f"rope_{i}_{k}"] = torch.cat([zero_rows(prefix, config["head_dim"]), grid])
    return outputs | tables | {"rotated": rotate(case.inputs["x"], tables["rope_0_0"])}


def train(case: Case) -> dict[str, Any]:
    model = build(case.config, state_of(case)).train()
    tokens, condition, uniforms = case.inputs["idx"], condition_of(case), case.inputs["u"]
    draws = RecordedDraws({"drop_condition": Recorded(uniforms, "batch")}, tuple(range(len(tokens))))
    losses = model.loss(Batch(tokens=tokens, condition=condition), draws, 0.0)
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    official = model.key_maps()["nar"].to_official(gradients)
    last = len(model.stack.blocks) - 1
    outputs = {"grad_wo": official[f"layers.{last}.attention.wo.weight"], "grad_output": official["output.weight"],
               "grad_medusa_output": official["medusa_output.weight"]}
    for name, expected in case.outputs.items():  # of large gradients, cases keep the first rows
        if name in outputs:
            outputs[name] = outputs[name][:len(expected)]
    logits = model.logits(tokens, condition, uniforms < model.conditioner.drop)
    return outputs | {"loss": losses.total, "logits": logits}


def draw(case: Case, model: NAR, scale: float, interval: int) -> dict[str, Any]:
    """One run of the settings in `config.sampling`: tokens in raster order, logits in that of generation."""
    sampling, condition, cells = case.config["sampling"], condition_of(case), model.order.cells
    if sampling.get("sample_logits", True):
        options = {name: sampling[name] for name in ("temperature", "top_k", "top_p") if name in sampling}
        uniforms = case.inputs["u"][:, cells.argsort()]  # given in the order of generation
        draws = RecordedDraws({"token": Recorded(uniforms, "batch pos")}, tuple(range(condition.size)))
    else:
        options, draws = {"temperature": 0.0}, Draws(0, range(condition.size))
    tokens, logits, kept = generate(model, condition, guidance_of(scale, interval), draws, **options)
    outputs = {"tokens": tokens, "logits": logits, "kept": kept, "fed_pos": model.order.prefix + cells,
               "steps": torch.tensor(len(model.order.steps))}
    if scale == 1:
        outputs["logits_uncached"] = model.logits(tokens, condition)
    return outputs


def sample(case: Case) -> dict[str, Any]:
    model, sampling = build(case.config["model"], state_of(case)), case.config["sampling"]
    if "cfg_intervals" not in sampling:
        return draw(case, model, sampling["cfg_scale"], sampling.get("cfg_interval", -1))
    outputs = {}
    for i, interval in enumerate(sampling["cfg_intervals"]):
        run = draw(case, model, sampling["cfg_scale"], interval)
        outputs |= {f"{name}_{i}": value for name, value in run.items()}
    return outputs


KINDS = {
    "nar/image_orders_rope": orders_and_rope,
    "nar/c2i_train": train,
    "nar/t2i_train": train,
    "nar/c2i_sample_cfg": sample,
    "nar/c2i_sample_cfg_interval": sample,
    "nar/c2i_sample_cfg_interval_edge": sample,
    "nar/c2i_sample_nocfg": sample,
    "nar/c2i_sample_sampled": sample,
    "nar/t2i_sample_cfg": sample,
}
