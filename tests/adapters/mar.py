"""Golden cases of LTH14/mar, the autoencoder aside."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.keymap import KeyMap
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, LinearInTokens
from varzoo.generators.base import Batch, Condition
from varzoo.generators.mar import MAR
from varzoo.generators.masked import MaskPlan, masked_steps
from varzoo.nn.denoiser import time_frequencies
from varzoo.nn.diffusion import Diffusion, hybrid_loss, spaced_timesteps
from varzoo.nn.diffusion_mlp import DiffusionMLP, diffusion_mlp_rules
from varzoo.nn.patches import patchify, unpatchify
from varzoo.predictions.diffusion import DiffusionPrediction
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.optim import WarmupConstant, WarmupCosine, parameter_groups

GUIDANCE = {"linear": LinearInTokens, "constant": Constant}


def norm_eps(config: dict[str, Any]) -> float:
    """The LayerNorm eps that the text under `norm_layer` names; torch's own where it names none."""
    found = re.search(r"eps\s*=\s*([\d.e+-]+)", str(config.get("norm_layer", "")))
    return float(found[1]) if found else 1e-5


def build_mar(config: dict[str, Any]) -> MAR:
    """A MAR from the official constructor's arguments (its defaults where the case leaves them out)."""
    side = config.get("img_size", 256) // config.get("vae_stride", 16) // config.get("patch_size", 1)
    spec = TokenSpec(kind="continuous", shape=(side, side),
                     size=config.get("vae_embed_dim", 16) * config.get("patch_size", 1) ** 2)
    return MAR(
        spec=spec, num_classes=config.get("class_num", 1000), encoder_width=config.get("encoder_embed_dim", 1024),
        encoder_depth=config.get("encoder_depth", 16), encoder_heads=config.get("encoder_num_heads", 16),
        decoder_width=config.get("decoder_embed_dim", 1024), decoder_depth=config.get("decoder_depth", 16),
        decoder_heads=config.get("decoder_num_heads", 16), mlp_ratio=config.get("mlp_ratio", 4.0),
        buffer_size=config.get("buffer_size", 64), norm_eps=norm_eps(config),
        head_width=config.get("diffloss_w", 1024), head_depth=config.get("diffloss_d", 3), noise_schedule="cosine",
        noise_steps=1000, head_batch=config.get("diffusion_batch_mul", 4),
        mask_ratio_min=config.get("mask_ratio_min", 0.7), class_drop=config.get("label_drop_prob", 0.1),
        attention_dropout=config.get("attn_dropout", 0.1), projection_dropout=config.get("proj_dropout", 0.1))


def loaded_mar(case: Case) -> MAR:
    words = re.search(r"LayerNorm has eps [\d.e+-]+", case.meta["call"])  # where the config does not say it
    model = build_mar(case.config if words is None else {"norm_layer": words[0].replace("eps ", "eps=")} | case.config)
    load_strictly(model, model.key_maps()["mar"].to_ours(case.state_dict), "the case")
    return model


def loaded_head(case: Case, *, prefix: str, channels: int, out_channels: int, condition_width: int, width: int,
                depth: int) -> DiffusionMLP:
    head = DiffusionMLP(channels=channels, out_channels=out_channels, condition_width=condition_width, width=width,
                        depth=depth)
    load_strictly(head, KeyMap(diffusion_mlp_rules(prefix, "")).to_ours(case.state_dict), "the case")
    return head


def diffloss_head(case: Case) -> DiffusionMLP:
    config = case.config
    return loaded_head(case, prefix="net.", channels=config["target_channels"],
                       out_channels=2 * config["target_channels"], condition_width=config["z_channels"],
                       width=config["width"], depth=config["depth"])


def gradients(case: Case, model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """All gradients under the case's names."""
    grads = key_map.to_official({name: parameter.grad for name, parameter in model.named_parameters()})
    return {f"grad.{name}": grad for name, grad in grads.items()}


def vit_block(case: Case) -> dict[str, Any]:
    config = case.config
    block = Block(config["dim"], config["num_heads"], mlp_ratio=config["mlp_ratio"], qkv_bias=config["qkv_bias"],
                  norm_layer=partial(nn.LayerNorm, eps=norm_eps(config)))
    load_strictly(block, case.state_dict, "the case")
    x = case.inputs["x"]
    return {"out": block(x), "out_small": block(0.001 * x)}


def diffloss_net(case: Case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    head = loaded_head(case, prefix="", channels=config["in_channels"], out_channels=config["out_channels"],
                       condition_width=config["z_channels"], width=config["model_channels"],
                       depth=config["num_res_blocks"])
    x, t, c = inputs["x"], inputs["t"], inputs["c"]
    half = len(x) // 2
    out = head(torch.cat([x[:half], x[:half]]), t, c)
    epsilon, v = out.tensor_split([config["in_channels"]], dim=-1)
    guided = epsilon[half:] + inputs["cfg_scale"] * (epsilon[:half] - epsilon[half:])
    return {"t_freq": time_frequencies(t), "out": head(x, t, c),
            "out_cfg": torch.cat([torch.cat([guided, guided]), v], dim=-1)}


def diffloss_loss(case: Case) -> dict[str, Any]:
    inputs, head = case.inputs, diffloss_head(case)
    mse, vb = hybrid_loss(Diffusion.named("cosine", 1000), lambda x, t: head(x, t, inputs["z"]), inputs["target"],
                          inputs["t"], inputs["noise"])
    terms, mask = mse + vb, inputs["mask"]
    loss = (terms * mask).sum() / mask.sum()
    loss.backward()
    return {"mse": mse, "vb": vb, "loss_terms": terms, "loss": loss, "loss_nomask": terms.mean(),
            **gradients(case, head, KeyMap(diffusion_mlp_rules("net.", "")))}


@torch.no_grad()
def diffloss_sample(case: Case) -> dict[str, Any]:
    inputs, head = case.inputs, diffloss_head(case)
    half = len(inputs["z"]) // 2

    def sample(condition: Tensor, scale: float, temperature: float, noises: str) -> Tensor:
        """Every row is an image of one token; condition [branches, rows, D]."""
        rows = condition.shape[1]
        arrays = {"init_noise": Recorded(inputs[f"init_noise{noises}"], "batch")}
        if f"step_noise{noises}" in inputs:
            arrays["step_noise"] = Recorded(inputs[f"step_noise{noises}"], "k batch")
        draws = RecordedDraws({name: Recorded(recorded.array.unsqueeze(-2), recorded.axes + " pos")
                               for name, recorded in arrays.items()}, samples=tuple(range(rows)))
        prediction = DiffusionPrediction(
            condition=condition[:, :, None], scale=scale, positions=torch.zeros(rows, 1, dtype=torch.int64),
            process=Diffusion.named("cosine", 1000), network=head)
        drawn = prediction.draw(draws, steps=case.config["num_sampling_steps"], temperature=temperature)
        return drawn.tokens[:, 0]

    both, scale = torch.stack([inputs["z"][:half], inputs["z"][half:]]), inputs["cfg_scale"].item()
    # A case without a temperature (diffloss_sample_full) has no step noise.
    temperature = inputs["temperature"].item() if "temperature" in inputs else 0.0
    return {"sample_cfg": sample(both, scale, temperature, ""), "sample_cfg_t0": sample(both, scale, 0.0, ""),
            "sample_nocfg": sample(inputs["z"][None], 1.0, temperature, "_full")}


def diffusion_schedule(case: Case) -> dict[str, Any]:
    outputs = {}
    for name, steps in case.config["named"]:
        full = Diffusion.named(name, steps)
        for respacing in case.config["respacings"]:
            prefix = f"{name}{steps}[{respacing}]."
            if not any(output.startswith(prefix) for output in case.outputs):
                continue  # the official code rejects it
            process = full.respaced(spaced_timesteps(respacing, steps)) if respacing else full
            outputs |= {f"{prefix}timestep_map": process.timesteps} | {
                prefix + field: getattr(process, field) for field in (
                    "betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                    "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_recip_alphas_cumprod",
                    "sqrt_recipm1_alphas_cumprod")}
    return outputs


def mask_schedule(case: Case) -> dict[str, Any]:
    outputs = {}
    guidance = LinearInTokens(case.config["cfg"])
    for length, num_iter in case.config["pairs"]:
        plan, prefix = MaskPlan(steps=num_iter), f"{length}_{num_iter}."
        counts, scales, masked = np.zeros(num_iter, int), np.zeros(num_iter), np.zeros(num_iter, int)
        # A step that draws nothing is not yielded: one token is left, as officially until the last step.
        masked[:], scales[:] = 1, 1 + (case.config["cfg"] - 1) * (length - 1) / length
        for step in masked_steps(plan, torch.arange(length)[None]):
            counts[step.index] = step.positions.shape[1]
            scales[step.index] = guidance(step)
            masked[step.index] = step.total - step.drawn
        outputs |= {f"{prefix}n_pred": counts, f"{prefix}cfg_linear": scales, f"{prefix}n_masked_before": masked}
    return outputs


def mar_forward(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_mar(case)
    size, length = len(inputs["imgs"]), model.spec.length
    tokens = patchify(inputs["imgs"], config.get("patch_size", 1))
    repeats = (model.head_batch, size, length)
    draws = RecordedDraws({
        "mask_rate": Recorded(inputs["mask_rate"], ""), "order": Recorded(inputs["orders"], "batch"),
        "drop_label": Recorded(inputs["drop_label"], "batch"),
        "t": Recorded(inputs["t"].view(repeats), "repeat batch pos"),
        "noise": Recorded(inputs["noise"].view(*repeats, -1), "repeat batch pos"),
    }, samples=tuple(range(size)))
    condition = Condition.classes(inputs["labels"])
    losses = model.loss(Batch(tokens=tokens, condition=condition), draws, progress=0.0)
    losses.total.backward()

    masked = int(np.ceil(length * inputs["mask_rate"].item()))
    visible = inputs["orders"][:, masked:].sort(dim=1).values
    vectors = torch.where(inputs["drop_label"][:, None], model.null_class, model.class_vectors(condition))
    everywhere = torch.arange(length).expand(size, -1)
    return {
        "tokens": tokens, "mask": torch.ones(size, length).scatter(1, visible, 0.0),
        "enc": model.backbone.encode(tokens, visible, vectors),
        "z": model.backbone(tokens, visible, vectors, everywhere), "loss": losses.total,
        "unpatchified": unpatchify(tokens, config.get("patch_size", 1), model.spec.shape),
        **gradients(case, model, model.key_maps()["mar"]),
    }


def mar_sample(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_mar(case).eval()
    size, length, num_iter = len(inputs["orders"]), model.spec.length, config["num_iter"]
    arrays = {"order": Recorded(inputs["orders"], "batch"), "init_noise": Recorded(inputs["init_noise"], "batch pos")}
    if "step_noise" in inputs:
        arrays["step_noise"] = Recorded(inputs["step_noise"], "k batch pos")
    guidance = GUIDANCE[config["cfg_schedule"]](config["cfg"])
    labels = inputs.get("labels")
    condition = Condition.nothing(size) if labels is None else Condition.classes(labels)

    counts, after = np.zeros(num_iter, int), [torch.empty(0)] * num_iter
    # What a step that draws nothing would report: one token left.
    scales = np.full(num_iter, 1 + (config["cfg"] - 1) * (length - 1) / length
                     if config["cfg_schedule"] == "linear" else config["cfg"])
    step_of = torch.zeros(size, length, dtype=torch.int64)
    z = torch.zeros(size, length, model.head.condition_embed.in_features)

    def record(progress: Any) -> None:
        step, rows = progress.step, torch.arange(size)[:, None]
        counts[step.index], scales[step.index] = step.positions.shape[1], guidance(step)
        step_of[rows, step.positions] = step.index
        # Predicting a step again hides its tokens again, so this is what they were drawn from.
        z[rows, step.positions] = progress.decoding.predict(step).condition[0]
        for index in range(step.index, num_iter):
            after[index] = progress.decoding.tokens

    draw = {"steps": config["num_sampling_steps"], "temperature": config["temperature"]}
    sampler = Autoregressive(guidance=guidance, plan=MaskPlan(steps=num_iter), draw=draw)
    tokens = sampler.sample(model, condition, RecordedDraws(arrays, tuple(range(size))), callback=record).tokens
    outputs = {"latents": unpatchify(tokens, config.get("patch_size", 1), model.spec.shape), "n_pred": counts,
               "cfg_iter": scales, "step_of": step_of, "z": z}
    if "snapshot_steps" in config:
        outputs["latents_after"] = torch.stack([after[index] for index in config["snapshot_steps"]])
    return outputs


def train_schedule(case: Case) -> dict[str, Any]:
    lr, model, inputs = case.config["lr"], build_mar(case.config["mar"]), case.inputs
    constant = WarmupConstant(warmup=lr["warmup_epochs"])
    cosine = WarmupCosine(warmup=lr["warmup_epochs"], total=lr["epochs"], floor=lr["min_lr"] / lr["lr"])
    groups = parameter_groups(model, model.decays)
    own_names = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [model.key_maps()["mar"].to_official({own_names[id(parameter)]: parameter for parameter in group["params"]})
             for group in groups]
    epochs = inputs["epoch"].tolist()
    ema = get_ema_avg_fn(inputs["ema_rate"].item())(inputs["ema_tgt"], inputs["ema_src"], 0)
    return {"lr_constant": [lr["lr"] * constant(epoch) for epoch in epochs],
            "lr_cosine": [lr["lr"] * cosine(epoch) for epoch in epochs],
            "decay": list(names[0]), "no_decay": list(names[1]), "ema": ema}


KINDS = {
    "mar/vit_block": vit_block,
    "mar/diffloss_net": diffloss_net,
    "mar/diffloss_loss": diffloss_loss,
    "mar/diffloss_sample": diffloss_sample,
    "mar/diffloss_sample_full": diffloss_sample,
    "mar/diffusion_schedule": diffusion_schedule,
    "mar/mask_schedule": mask_schedule,
    "mar/mar_forward": mar_forward,
    "mar/mar_forward_patch2": mar_forward,
    "mar/mar_sample_constant": mar_sample,
    "mar/mar_sample_linear": mar_sample,
    "mar/mar_sample_stochastic": mar_sample,
    "mar/mar_sample_stochastic_constant": mar_sample,
    "mar/mar_sample_uncond": mar_sample,
    "mar/train_schedule": train_schedule,
}
