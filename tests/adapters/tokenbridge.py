"""Golden cases of YuqingWang1029/TokenBridge, the autoencoder aside (it is MAR's)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adapters.mar import GUIDANCE
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import LinearInTokens, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.masked import MaskPlan, masked_steps, split_order
from varzoo.generators.tokenbridge import TokenBridge
from varzoo.loading import compose_config
from varzoo.nn.gaussian_quantizer import GaussianQuantizer, gaussian_bins
from varzoo.nn.patches import patchify, unpatchify
from varzoo.predictions.channels import ChannelPrediction
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.optim import WarmupCosine


@cache
def published_order() -> list[int]:
    """The channel order that the configs have."""
    return list(compose_config("sample", ["generator=tokenbridge_l", "checkpoint=none"]).generator.channel_order)


def build_quantizer(config: dict[str, Any], levels: int | None = None) -> GaussianQuantizer:
    return GaussianQuantizer(levels=levels or config["quant_levels"], low=config.get("quant_min", -5.0),
                             high=config.get("quant_max", 5.0), spread=config.get("std_range", 3.0))


def build_model(config: dict[str, Any]) -> TokenBridge:
    """A TokenBridge from the official constructor's arguments."""
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    spec = TokenSpec(kind="discrete", shape=(side, side), size=config["quant_levels"], depth=config["vae_embed_dim"])
    return TokenBridge(
        spec=spec, quantizer=build_quantizer(config), num_classes=config["class_num"],
        encoder_width=config["encoder_embed_dim"], encoder_depth=config["encoder_depth"],
        encoder_heads=config["encoder_num_heads"], decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"], decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"], buffer_size=config["buffer_size"], norm_eps=config["norm_eps"],
        head_width=config["channel_embed_dim"], head_depth=config["channel_depth"],
        head_heads=config["channel_heads"], channel_order=published_order(), classifier=nn.Linear,
        mask_ratio_min=config["mask_ratio_min"], class_drop=config["label_drop_prob"],
        attention_dropout=config["attn_dropout"], projection_dropout=config["proj_dropout"])


def loaded_model(case: Case) -> TokenBridge:
    model = build_model(case.config)
    load_strictly(model, model.key_maps()["tokenbridge"].to_ours(case.state_dict), "the case")
    return model


def quantizer(case: Case) -> dict[str, Any]:
    table = build_quantizer(case.config)
    edges, means = gaussian_bins(table.levels, table.spread)
    ids = table.ids(case.inputs["x"])
    values = table.values(ids)
    return {"boundaries": edges, "reconstruction_values": means, "values": table.table, "indices": ids,
            "dequant": values, "reindices": table.ids(values)}


def quantizer_tables(case: Case) -> dict[str, Any]:
    outputs = {}
    for name, safe in case.outputs.items():
        if not name.startswith("safe_"):
            continue
        levels = int(name.removeprefix("safe_"))
        table = build_quantizer(case.config, levels)
        edges, means = gaussian_bins(levels, table.spread)
        ids = table.ids(case.inputs["x"])
        expected_ids, expected_values = case.outputs[f"indices_{levels}"], case.outputs[f"dequant_{levels}"]
        outputs |= {f"boundaries_{levels}": edges, f"reconstruction_values_{levels}": means, name: safe,
                    # close to a tie the case does not decide
                    f"indices_{levels}": torch.where(safe, ids, expected_ids),
                    f"dequant_{levels}": torch.where(safe, table.values(ids), expected_values)}
    return outputs


def order_of_channels(case: Case) -> dict[str, Any]:
    order = torch.tensor(published_order())
    tokens = case.inputs["tokens"][..., order]
    return {"channel_order": order, "inv_channel_order": order.argsort(), "head_tokens": tokens,
            "restored": tokens[..., order.argsort()]}


@torch.no_grad()
def backbone(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_model(case).eval()
    ids = model.quantizer.ids(patchify(inputs["latents"], 1))
    values = model.values(ids)
    size, length = ids.shape[:2]
    visible = (inputs["mask"] == 0).nonzero()[:, 1].view(size, -1)
    everywhere = torch.arange(length).expand(size, -1)
    outputs = {"indices": ids, "values": values}
    for name, condition in (("", Condition.classes(inputs["labels"])), ("_null", Condition.nothing(size))):
        vectors = model.class_vectors(condition)
        outputs |= {f"encoded{name}": model.backbone.encode(values, visible, vectors),
                    f"z{name}": model.backbone(values, visible, vectors, everywhere)}
    return outputs


@torch.no_grad()
def head_teacher_forced(case: Case) -> dict[str, Any]:
    head, rows = loaded_model(case).eval().head, case.inputs["mask"].bool()
    targets = case.inputs["targets"][rows]
    logits = head.logits(head.hidden(case.inputs["z"][rows], targets[:, :-1], sampling=False))
    return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


def drawn_rows(model: TokenBridge, z: Tensor, temperature: float, gumbel: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids `[R, C]` in the head's order and logits `[R, C, K]` of feature rows, each an image of one token."""
    arrays = {} if gumbel is None else {"token": Recorded(gumbel[:, :, None], "channel batch pos")}
    prediction = ChannelPrediction(features=z[:, None], positions=torch.zeros(len(z), 1, dtype=torch.int64),
                                   head=model.head)
    draws = RecordedDraws(arrays, samples=tuple(range(len(z))))
    drawn = list(prediction.channels(draws, temperature=temperature))
    ids = prediction.draw(draws, temperature=temperature).tokens[:, 0]
    logits = torch.stack([logits[:, 0] for logits, _ in drawn], dim=1)
    return ids[:, model.head.order], logits


@torch.no_grad()
def head_greedy(case: Case) -> dict[str, Any]:
    model, z = loaded_model(case).eval(), case.inputs["z"]
    ids, cached = drawn_rows(model, z, 0.0, None)
    head = model.head
    anew, forced = (head.logits(head.hidden(z, ids[:, :-1], sampling=sampling)) for sampling in (True, False))
    return {"tokens": ids, "logits": anew, "logits_cached": cached, "tokens_vae": ids[:, head.inverse],
            "logits_teacher_forced": forced}


@torch.no_grad()
def head_gumbel(case: Case) -> dict[str, Any]:
    ids, logits = drawn_rows(loaded_model(case).eval(), case.inputs["z"], case.config["temperature"],
                             case.inputs["gumbel"])
    return {"tokens": ids, "logits": logits}


def train_loss(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_model(case).train()
    size = len(inputs["labels"])
    draws = RecordedDraws({"mask_rate": Recorded(inputs["mask_rate"], ""), "order": Recorded(inputs["orders"], "batch"),
                           "drop_label": Recorded(inputs["drop_u"], "batch")}, samples=tuple(range(size)))
    tokens = model.quantizer.ids(patchify(inputs["latents"], 1))
    condition = Condition.classes(inputs["labels"])
    loss = model.loss(Batch(tokens=tokens, condition=condition), draws, progress=0.0).total
    loss.backward()
    gradients = model.key_maps()["tokenbridge"].to_official(
        {name: parameter.grad for name, parameter in model.named_parameters()})
    masked, _ = split_order(inputs["orders"], inputs["mask_rate"].item())
    targets = model.targets(tokens, masked)
    with torch.no_grad():
        _, rows = model.training_rows(tokens, condition, draws, model.mask_rate)
        logits = model.head.logits(model.head.hidden(rows.flatten(0, 1), targets[:, :-1], sampling=False))
    return {"loss": loss, "mask": torch.zeros(size, model.spec.length).scatter(1, masked, 1.0), "targets": targets,
            "logits": logits, "grad_names": case.outputs["grad_names"],
            "grad_norms": torch.stack([gradients[str(name)].norm() for name in case.outputs["grad_names"]])}


@torch.no_grad()
def sample(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_model(case).eval()
    size, length, steps = len(inputs["orders"]), model.spec.length, config["num_iter"]
    arrays = {"order": Recorded(inputs["orders"], "batch")}
    if "gumbel" in inputs:
        arrays["token"] = Recorded(inputs["gumbel"], "batch pos channel")
    draws = RecordedDraws(arrays, samples=tuple(range(size)))
    guidance: Schedule = GUIDANCE[config["cfg_schedule"]](config["cfg"])
    left, scales, counts = np.ones(steps), np.zeros(steps), np.zeros(steps, int)
    step_of, rows = torch.zeros(size, length, dtype=torch.int64), torch.arange(size)[:, None]
    z = torch.zeros(size, length, model.backbone.decoder_norm.normalized_shape[0])
    logits = torch.zeros(size, length, model.spec.depth, model.spec.size)
    in_turn: list[Tensor] = []

    def record(progress: Any) -> None:
        step = progress.step
        left[step.index], scales[step.index] = step.left, guidance(step)
        counts[step.index] = step.positions.numel()
        step_of[rows, step.positions] = step.index
        prediction = progress.decoding.predict(step)  # as it was: the step's own tokens are hidden again
        z[rows, step.positions] = prediction.features
        in_turn.append(prediction.features.flatten(0, 1))
        drawn = list(prediction.channels(draws, temperature=config["temperature"]))
        logits[rows, step.positions] = torch.stack([logits for logits, _ in drawn], dim=2)

    sampler = Autoregressive(guidance=guidance, plan=MaskPlan(steps=steps),
                             draw={"temperature": config["temperature"]})
    labels = inputs.get("labels")
    condition = Condition.nothing(size) if labels is None else Condition.classes(labels)
    tokens = sampler.sample(model, condition, draws, callback=record).tokens
    return {"latents": unpatchify(model.values(tokens), 1, model.spec.shape), "tokens": tokens, "mask_len": left,
            "cfg_scale": scales, "num_predicted": counts, "logits": logits, "step_of": step_of,
            "z": z if case.outputs["z"].ndim == 3 else torch.cat(in_turn)}


def schedules(case: Case) -> dict[str, Any]:
    config, inputs, outputs = case.config, case.inputs, {}
    guidance = LinearInTokens(config["cfg"])
    for length, steps in config["combos"]:
        # What a step that draws nothing would report: one token left.
        left, counts = np.ones(steps), np.zeros(steps)
        scales = np.full(steps, 1 + (config["cfg"] - 1) * (length - 1) / length)
        for step in masked_steps(MaskPlan(steps=steps), torch.arange(length)[None]):
            left[step.index], scales[step.index] = step.left, guidance(step)
            counts[step.index] = step.positions.shape[1]
        suffix = f"{length}_{steps}"
        outputs |= {f"mask_len_{suffix}": left, f"cfg_linear_{config['cfg']}_{suffix}": scales,
                    f"num_predicted_{suffix}": counts}
    normal, low = torch.distributions.Normal(0.0, 1.0), (config["mask_ratio_min"] - 1) / 0.25
    below, above = normal.cdf(torch.tensor([low, 0.0], dtype=torch.float64))
    rates = (1 + 0.25 * normal.icdf(below + (above - below) * inputs["u"])).clamp(config["mask_ratio_min"], 1)
    cosine = WarmupCosine(warmup=config["warmup_epochs"], total=config["epochs"],
                          floor=config["min_lr"] / config["lr"])
    masked = [split_order(torch.arange(256)[None], rate)[0].shape[1] for rate in rates.tolist()]
    return outputs | {"mask_rate_ppf": rates, "num_masked_256": masked,
                      "lr_cosine": [config["lr"] * cosine(epoch) for epoch in inputs["epoch"].tolist()]}


KINDS = {
    "tokenbridge/quantizer": quantizer,
    "tokenbridge/quantizer_tables": quantizer_tables,
    "tokenbridge/channel_order": order_of_channels,
    "tokenbridge/backbone": backbone,
    "tokenbridge/head_teacher_forced": head_teacher_forced,
    "tokenbridge/head_greedy": head_greedy,
    "tokenbridge/head_gumbel": head_gumbel,
    "tokenbridge/train_loss": train_loss,
    "tokenbridge/sample_nocfg": sample,
    "tokenbridge/sample_cfg_linear": sample,
    "tokenbridge/sample_cfg_constant": sample,
    "tokenbridge/sample_stochastic": sample,
    "tokenbridge/sample_stochastic_constant": sample,
    "tokenbridge/schedules": schedules,
}
