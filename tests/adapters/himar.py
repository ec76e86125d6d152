"""Golden cases of HiDream-ai/himar."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.adapters.mar import GUIDANCE, gradients, norm_eps
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import LinearInTokens
from varzoo.eval.moments import Moments, frechet_distance
from varzoo.generators.base import Batch, Condition
from varzoo.generators.himar import DENSE, PIVOT, HiMAR
from varzoo.generators.masked import CosineRate, MaskPlan, TruncatedNormalRate, masked_steps
from varzoo.nn.diffusion import Diffusion, epsilon_loss, spaced_timesteps
from varzoo.nn.diffusion_transformer import DiffusionTransformer, diffusion_transformer_rules
from varzoo.nn.patches import patchify, unpatchify
from varzoo.nn.scale_aware_vit import ScaleAwareBlock
from varzoo.nn.solvers import Known
from varzoo.predictions.diffusion import MapDiffusionPrediction
from varzoo.samplers.autoregressive import Autoregressive

flat = partial(patchify, patch_size=1)  # maps [B, C, h, w] -> tokens [B, N, C]
EPOCHS = 800


def build_himar(config: dict[str, Any]) -> HiMAR:
    """A HiMAR from the official constructor's arguments."""
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    return HiMAR(
        spec=TokenSpec(kind="continuous", shape=(side, side), size=config["vae_embed_dim"]),
        pivot_shape=(config["cond_scale"],) * 2, num_classes=config["class_num"],
        encoder_width=config["encoder_embed_dim"], encoder_depth=config["encoder_depth"],
        encoder_heads=config["encoder_num_heads"], decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"], decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"], buffer_size=config["buffer_size"], norm_eps=norm_eps(config),
        head_width=config["diffloss_w"], head_depth=config["diffloss_d"], map_head_width=config["gdm_w"],
        map_head_depth=config["gdm_d"], map_head_heads=config["head"], map_head_mlp_ratio=config["ratio"],
        noise_schedule="cosine", noise_steps=1000, head_batch=config["diffusion_batch_mul"],
        # Cases give the rates themselves, which only this law draws as they are.
        pivot_mask_rate=TruncatedNormalRate(low=config["mask_ratio_min"]),
        dense_mask_rate=TruncatedNormalRate(low=config["mask_ratio_min"]), pivot_weight=64 / 320 * 2.0,
        dense_weight=256 / 320 * 0.75, class_drop=config["label_drop_prob"], pivot_keep=config["step_stage2_rate"],
        pivot_warmup=config["step_warmup"] / EPOCHS, attention_dropout=config["attn_dropout"],
        projection_dropout=config["proj_dropout"])


def loaded_himar(case: Case) -> HiMAR:
    model = build_himar(case.config)
    load_strictly(model, model.key_maps()["himar"].to_ours(case.state_dict), "the case")
    return model


def loaded_transformer(case: Case, prefix: str, **sizes: Any) -> tuple[DiffusionTransformer, KeyMap]:
    head = DiffusionTransformer(**sizes)
    key_map = KeyMap(diffusion_transformer_rules(prefix, "", sizes["grid"], sizes["width"]))
    load_strictly(head, key_map.to_ours(case.state_dict), "the case")
    return head, key_map


def dense_head(case: Case) -> tuple[DiffusionTransformer, KeyMap]:
    config, maps = case.config, case.inputs["z"]
    return loaded_transformer(
        case, "net.", grid=tuple(maps.shape[2:]), channels=config["target_channels"],
        out_channels=config["target_channels"], condition_width=config["z_channels"], width=config["width"],
        depth=config["depth"], heads=config["head"], mlp_ratio=config["ratio"])


def scale_aware_block(case: Case) -> dict[str, Any]:
    config, x, vector = case.config, case.inputs["x"], case.inputs["c"][0, 0]
    norm = partial(nn.LayerNorm, eps=norm_eps(config))
    block = ScaleAwareBlock(config["dim"], config["num_heads"], phases=config["num_tasks"], norm_layer=norm,
                            mlp_ratio=config["mlp_ratio"], qkv_bias=config["qkv_bias"])
    renamed = [Rename(f"adaLN_{kind}", f"phase_{kind}", convert=lambda table: table.flatten(1))
               for kind in ("scale", "shift")]
    load_strictly(block, KeyMap([*renamed, Rename("{rest*}", "{rest*}")]).to_ours(case.state_dict), "the case")
    last = config["num_tasks"] - 1
    return {**{f"out{phase}": block(x, block.modulation(vector, phase)) for phase in range(config["num_tasks"])},
            "out1_small": block(0.001 * x, block.modulation(vector, min(1, last)))}


@torch.no_grad()
def dit_head(case: Case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    grid = tuple(inputs["x"].shape[2:])
    head, key_map = loaded_transformer(
        case, "", grid=grid, channels=config["in_channels"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1), condition_width=config["c_channels"],
        width=config["hidden_size"], depth=config["depth"], heads=config["num_heads"], mlp_ratio=config["mlp_ratio"])
    x, z, times = flat(inputs["x"]), flat(inputs["z"]), inputs["t"][:, None]
    half = len(x) // 2
    conditional, null = head(torch.cat([x[:half], x[:half]]), times, z).tensor_split([half])
    guided = null + inputs["cfg_scale"] * (conditional - null)
    maps = partial(unpatchify, patch_size=1, grid=grid)
    return {"out": maps(head(x, times, z)), "out_cfg": maps(torch.cat([guided, guided])),
            "pos_embed": key_map.to_official(head.state_dict())["pos_embed"]}


def dense_diffusion_loss(case: Case) -> dict[str, Any]:
    inputs, (head, key_map) = case.inputs, dense_head(case)
    z = flat(inputs["z"])
    error = epsilon_loss(Diffusion.named("cosine", 1000), lambda x, t: head(x, t, z), flat(inputs["target"]),
                         inputs["t"][:, None], flat(inputs["noise"]))
    terms = (error * inputs["mask"].flatten(1)).mean(dim=1)
    terms.mean().backward()
    return {"loss_terms": terms, "loss": terms.mean(), **gradients(case, head, key_map)}


@torch.no_grad()
def dense_diffusion_sample(case: Case) -> dict[str, Any]:
    inputs, (head, _) = case.inputs, dense_head(case)
    noise, z, masked = flat(inputs["init_noise"]), flat(inputs["z"]), inputs["mask"].flatten(1)
    batch, count = noise.shape[:2]
    arrays = {"init_noise": Recorded(noise, "batch pos")}
    if "step_noise" in inputs:
        arrays["step_noise"] = Recorded(torch.stack([flat(step) for step in inputs["step_noise"]]), "k batch pos")

    def sample(condition: Tensor, scale: float, temperature: float) -> Tensor:
        prediction = MapDiffusionPrediction(
            condition=condition, scale=scale, positions=torch.arange(count).expand(batch, -1), redraw=0,
            process=Diffusion.named("cosine", 1000), network=head,
            known=Known(mask=~masked[..., None], values=flat(inputs["tokens"])))
        drawn = prediction.draw(RecordedDraws(arrays, tuple(range(batch))), temperature=temperature,
                                steps=case.config.get("respacing", "250"))
        return unpatchify(drawn.tokens, 1, tuple(inputs["z"].shape[2:]))

    scale = inputs["cfg_scale"].item()
    temperature = inputs["temperature"].item() if "temperature" in inputs else 0.0
    return {"sample_cfg": sample(z.unflatten(0, (2, batch)), scale, temperature),
            "sample_nocfg_t0": sample(z[None, :batch], 1.0, 0.0)}


def diffusion_schedule(case: Case) -> dict[str, Any]:
    full, outputs = Diffusion.named("cosine", 1000), {}
    for respacing in case.config["respacings"]:
        process = full.respaced(spaced_timesteps(respacing, 1000)) if respacing else full
        outputs |= {f"[{respacing}].timestep_map": process.timesteps,
                    f"[{respacing}].log_variance": process.fixed_log_variance,
                    f"[{respacing}].posterior_mean_coef1": process.posterior_mean_coef1,
                    f"[{respacing}].posterior_mean_coef2": process.posterior_mean_coef2}
    return outputs


def step_table(length: int, steps: int, cfg: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens drawn, linear guidance and tokens masked before, of every step."""
    counts, masked = np.zeros(steps, int), np.ones(steps, int)  # a step that draws nothing: one token is left
    scales = np.full(steps, 1 + (cfg - 1) * (length - 1) / length)
    for step in masked_steps(MaskPlan(steps=steps), torch.arange(length)[None]):
        counts[step.index], scales[step.index] = step.positions.shape[1], LinearInTokens(cfg)(step)
        masked[step.index] = step.total - step.drawn
    return counts, scales, masked


def mask_schedule(case: Case) -> dict[str, Any]:
    outputs = {}
    for side, steps, cfg, re_cfg in case.config["settings"]:
        prefix = f"{side}_{steps}_{cfg}_{re_cfg}."
        counts, scales, _ = step_table(side**2, 4 * side, re_cfg)
        outputs |= {f"{prefix}small_n_pred": counts, f"{prefix}small_cfg": scales}
        _, scales, masked = step_table(256, steps, cfg)
        outputs |= {f"{prefix}dense_masked_before": masked, f"{prefix}dense_cfg": scales}
    return outputs


def mask_rate_and_fid(case: Case) -> dict[str, Any]:
    rates = [CosineRate()(RecordedDraws({"rate": Recorded(uniform, "")}, (0,)), "rate") for uniform in case.inputs["u"]]
    gaussians = []
    for features in (case.inputs["features1"], case.inputs["features2"]):
        moments = Moments(dim=features.shape[1])
        moments.update(features)
        gaussians.append(moments.gaussian())
    return {"mask_rate_dense": rates, "n_masked_dense": [int(np.ceil(256 * rate)) for rate in rates],
            "fid": frechet_distance(*gaussians)}


def himar_forward(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_himar(case)
    tokens, pivots, orders = flat(inputs["imgs"]), flat(inputs["cond"]), inputs["orders"]
    (size, count), length, repeats = pivots.shape[:2], model.spec.length, model.head_batch
    by_token = (repeats, size, count)
    draws = RecordedDraws({
        "pivot_mask_rate": Recorded(inputs["rate_small"], ""), "dense_mask_rate": Recorded(inputs["rate_dense"], ""),
        "pivot_order": Recorded(orders[:, :count], "batch"),
        "dense_order": Recorded(orders[:, count:] - count, "batch"),
        "drop_pivot_label": Recorded(inputs["drop_label_small"], "batch"),
        "drop_dense_label": Recorded(inputs["drop_label_dense"], "batch"),
        "drop_pivots": Recorded(inputs["u_null"], "batch"),
        "pivot_t": Recorded(inputs["t_small"].view(by_token), "repeat batch pos"),
        "pivot_noise": Recorded(inputs["noise_small"].view(*by_token, -1), "repeat batch pos"),
        "dense_t": Recorded(inputs["t_dense"].view(repeats, size), "repeat batch"),
        "dense_noise": Recorded(flat(inputs["noise_dense"]).unflatten(0, (repeats, size)), "repeat batch pos"),
    }, samples=tuple(range(size)))
    condition = Condition.classes(inputs["labels"])
    batch = Batch(tokens=tokens, condition=condition, extras={"pivots": pivots})
    losses = model.loss(batch, draws, progress=config["epoch"] / EPOCHS)
    losses.total.backward()

    def split(order: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        masked, visible = order.tensor_split([int(np.ceil(order.shape[1] * rate.item()))], dim=1)
        return masked, visible.sort(dim=1).values

    def vectors(dropped: Tensor) -> Tensor:
        return torch.where(dropped[:, None], model.null_class, model.class_vectors(condition))

    masked, visible = split(orders[:, :count], inputs["rate_small"])
    small, stack = vectors(inputs["drop_label_small"]), model.backbone.stack(PIVOT)
    everywhere = torch.arange(count + length).expand(size, -1)
    z_small = model.hidden_pivots(pivots, visible, small, everywhere[:, :count])
    rows = model.pivot_embed(torch.stack([pivots[b, visible[b]] for b in range(size)]))
    enc_small = model.backbone.encode_rows(rows, visible, small, stack)

    shown = torch.zeros(size, count, dtype=torch.bool).scatter(1, masked, True)
    shown_share = config["step_stage2_rate"] * min(1, config["epoch"] / config["step_warmup"])
    shown &= inputs["u_null"][:, None] > 1 - shown_share
    masked_dense, visible_dense = split(orders[:, count:] - count, inputs["rate_dense"])
    seen, encoded = model.encode_map(model.pivot_rows(z_small, shown), tokens, visible_dense,
                                     vectors(inputs["drop_label_dense"]))
    z_dense = model.backbone.decode_rows(encoded, seen, everywhere[:, ::5], model.backbone.stack(DENSE))
    nothing = torch.zeros(size, count + length)
    return {
        "mask_small": torch.cat([nothing[:, :count].scatter(1, masked, 1.0), torch.ones(size, length)], dim=1),
        "mask_dense": nothing.scatter(1, masked_dense + count, 1.0), "enc_small": enc_small,
        "enc_dense_sub": encoded[:, ::5], "z_small": z_small, "z_dense_sub": z_dense,
        "loss1": 2.0 * losses.parts["pivot"], "loss2": 0.75 * losses.parts["dense"], "total": losses.total,
        **gradients(case, model, model.key_maps()["himar"]),
    }


def himar_sample(case: Case) -> dict[str, Any]:
    config, inputs, model = case.config, case.inputs, loaded_himar(case).eval()
    count, length, steps = model.pivot_count, model.spec.length, config["num_iter"]
    pivot_grid, size = (config["cond_scale"],) * 2, len(inputs["orders"])
    small_steps = 4 * config["cond_scale"]
    orders, dense_noise = inputs["orders"], inputs["init_noise_dense"]
    arrays = {
        "pivot_order": Recorded(orders[:, :count], "batch"),
        "dense_order": Recorded(orders[:, count:] - count, "batch"),
        "pivot_init_noise": Recorded(inputs["init_noise_small"], "batch pos"),
        "dense_init_noise": Recorded(torch.stack([flat(noise) for noise in dense_noise]), "redraw batch pos"),
    }
    if "step_noise_small" in inputs:
        noise = inputs["step_noise_dense"]
        arrays["pivot_step_noise"] = Recorded(inputs["step_noise_small"], "k batch pos")
        arrays["dense_step_noise"] = Recorded(
            flat(noise.flatten(0, 2)).unflatten(0, noise.shape[:3]), "redraw k batch pos")
    draws = RecordedDraws(arrays, tuple(range(size)))
    law = GUIDANCE[config["cfg_schedule"]]
    guidance = {"pivot": law(config["re_cfg"]), "dense": law(config["cfg"])}
    options = {"pivot": {"steps": config["num_sampling_steps"], "temperature": config["temperature"]},
               "dense": {"steps": config["dense_respacing"], "temperature": config["temperature"]}}
    plan = {"pivot": MaskPlan(steps=small_steps), "dense": MaskPlan(steps=steps)}

    small, dense = (step_table(n, of, cfg) for n, of, cfg in (
        (count, small_steps, config["re_cfg"]), (length, steps, config["cfg"])))
    step_of, seen = torch.zeros(size, count, dtype=torch.int64), {}
    small_after, whole = [torch.empty(0)] * small_steps, {}

    Autoregressive(guidance=guidance, plan=plan, draw=options).check(model)
    with torch.no_grad():  # the plain loop, written out to see each prediction before its step is committed
        decoding = model.begin(Condition.classes(inputs["labels"]), draws=draws, guidance=guidance, plan=plan)
        for step in decoding.steps:
            prediction = decoding.predict(step)
            if step.phase == "dense":
                everywhere = torch.arange(length).expand(size, -1)
                raw = type(prediction)(**vars(prediction) | {"positions": everywhere}).draw(draws, **options["dense"])
                known = prediction.known
                seen[step.index] = (prediction.condition[0], torch.where(known.mask, known.values, 0))
                whole[step.index] = (raw.tokens, torch.where(known.mask, known.values, raw.tokens))
            drawn = prediction.draw(draws, **options[step.phase])
            decoding.commit(step, drawn.tokens, prediction.carry)
            if step.phase == "pivot":
                step_of.scatter_(1, step.positions, step.index)
                small_after[step.index:] = [decoding.pivots] * (small_steps - step.index)
    maps = partial(unpatchify, patch_size=1)
    constant = {"small_cfg": np.full(small_steps, config["re_cfg"]), "dense_cfg": np.full(steps, config["cfg"])}
    outputs = {
        "small_latents": maps(decoding.pivots, grid=pivot_grid),
        "latents": maps(decoding.tokens, grid=model.spec.shape),
        "small_z": decoding.hidden, "small_n_pred": small[0], "small_cfg": small[1], "small_step_of": step_of,
        "dense_masked_before": dense[2], "dense_cfg": dense[1],
        "dense_z0": maps(seen[0][0], grid=model.spec.shape)[:, :, ::3, ::3],
        "dense_known_last": maps(seen[steps - 1][1], grid=model.spec.shape),
        **(constant if config["cfg_schedule"] == "constant" else {}),
    }
    if "snapshot_steps_small" in config:
        outputs["small_after"] = torch.stack([small_after[index] for index in config["snapshot_steps_small"]])
    if "snapshot_steps_dense" in config:
        shots = config["snapshot_steps_dense"]
        outputs["dense_raw"] = torch.stack([maps(whole[index][0], grid=model.spec.shape) for index in shots])
        outputs["dense_after"] = torch.stack([whole[index][1] for index in shots])
    return outputs


KINDS = {
    "himar/scale_aware_block": scale_aware_block,
    "himar/dit_head": dit_head,
    "himar/dense_diffusion_loss": dense_diffusion_loss,
    "himar/dense_diffusion_sample": dense_diffusion_sample,
    "himar/dense_diffusion_sample_250": dense_diffusion_sample,
    "himar/diffusion_schedule": diffusion_schedule,
    "himar/mask_schedule": mask_schedule,
    "himar/mask_rate_and_fid": mask_rate_and_fid,
    "himar/himar_forward": himar_forward,
    "himar/himar_forward_epoch30": himar_forward,
    "himar/himar_sample_linear": himar_sample,
    "himar/himar_sample_constant": himar_sample,
    "himar/himar_sample_dense_nocfg": himar_sample,
    "himar/himar_sample_stochastic": himar_sample,
}
