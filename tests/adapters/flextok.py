"""FlexTok: quantiser, encoder, flow decoder, guidance, training step and the whole pipeline."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.keymap import KeyMap
from varzoo.loading import build
from varzoo.nn.fsq import FSQ
from varzoo.nn.guidance import AdaptiveProjected, ClassifierFree, Guidance
from varzoo.nn.noise_levels import LogitNormal, Mode, StratifiedLogitNormal, Uniform
from varzoo.tokenizers.flextok import FlexTok, FlowDecoder, RegisterEncoder
from varzoo.tokenizers.flextok.networks import fit_table, sincos_table, time_features
from varzoo.tokenizers.flextok.official import decoder_rules, encoder_rules, settings
from varzoo.tokenizers.flextok.tokenizer import NestedDropout, flow_loss, powers_of_two


def loaded(module: nn.Module, rules: list, case: Case, part: str) -> Any:
    state = {name: value for name, value in case.state_dict.items() if name.startswith(f"{part}.")}
    load_strictly(module, KeyMap(rules).to_ours(state), "golden case")
    return module


def encoder_of(case: Case) -> RegisterEncoder:
    encoder = build(settings(case.config)[0]["encoder"])
    return loaded(encoder, encoder_rules(encoder, ""), case, "encoder")


def decoder_of(case: Case) -> FlowDecoder:
    decoder = build(settings(case.config)[0]["decoder"])
    return loaded(decoder, decoder_rules(decoder, ""), case, "decoder")


def quantizer_of(case: Case) -> FSQ:
    return build(settings(case.config)[0]["quantizer"])


def tokenizer_of(case: Case, latents: Tensor, guidance: Guidance | None = None) -> FlexTok:
    """The case's tokenizer; parts that a case lacks (VAE, encoder) are made up to fit latents `[B, C, h, w]`."""
    said, _ = settings(case.config)
    decoder = said["decoder"]
    vae = {"_target_": "varzoo.tokenizers.kl.KLTokenizer", "width": 32, "multipliers": [1, 1], "blocks_per_level": 1,
           "attention_levels": [], "latent_channels": decoder["channels"], "patch_size": 1, "scale": 1.0, "shift": 0.0,
           "kl_weight": 0.0} | said.get("vae", {})
    factor = 2 ** (len(vae["multipliers"]) - 1)
    vae["image_size"] = [side * factor for side in latents.shape[-2:]]
    encoder = said.get("encoder") or {
        "_target_": "varzoo.tokenizers.flextok.RegisterEncoder", "out_channels": decoder["code_channels"],
        **{name: decoder[name] for name in ("channels", "patch_size", "position_grid", "position_scaling", "registers",
                                            "width", "depth", "head_dim", "mlp_ratio")}}
    rest = {"_target_": "varzoo.tokenizers.flextok.FlexTok", "posterior": True, "kept": "uniform", "null_drop": 0.1,
            "noise_levels": {"_target_": "varzoo.nn.noise_levels.LogitNormal"}, "spread": 0.0, "repa": None,
            "steps": 20, "guidance": {"_target_": "varzoo.nn.guidance.ClassifierFree", "scale": 1.0}}
    tokenizer = build(rest | said | {"vae": vae, "encoder": encoder})
    own = {name: value for name, value in tokenizer.state_dict().items()
           if not any(key.startswith(name.split(".")[0] + ".") for key in case.state_dict)}
    load_strictly(tokenizer, own | tokenizer.key_maps()["flextok"].to_ours(case.state_dict), "golden case")
    return tokenizer


def given(**arrays: Tensor) -> RecordedDraws:
    size = len(next(iter(arrays.values())))
    return RecordedDraws({name: Recorded(value, "batch") for name, value in arrays.items()}, tuple(range(size)))


def fsq(case: Case) -> dict[str, Any]:
    quantizer, z = FSQ(levels=case.config["levels"]), case.inputs["z"].clone().requires_grad_()
    codes = quantizer(z)
    (codes * case.inputs["g"]).sum().backward()
    looked_up = quantizer.codes(case.inputs["indices"])
    return {"bounded": quantizer.bound(z), "quant": codes, "tokens": quantizer.ids(codes), "grad_z": z.grad,
            "codes": looked_up, "indices_back": quantizer.ids(looked_up)}


def fsq_train(case: Case) -> dict[str, Any]:
    levels, inputs, share = case.config["levels"], case.inputs, case.config["corrupt_tokens_p"]
    dropped = FSQ(levels=levels, unrounded=case.config["drop_quant_p"])
    corrupted = FSQ(levels=levels, corrupted=(share, share))
    draws = RecordedDraws({
        "unrounded": Recorded(inputs["drop_mask"].bool(), "batch"), "corrupt": Recorded(inputs["u"], "batch"),
        "corrupt_share": Recorded(torch.zeros(1), "batch"), "corrupt_id": Recorded(inputs["random_indices"], "batch"),
    }, tuple(range(len(inputs["z"]))))
    codes = corrupted.perturbed(inputs["z"], draws)
    return {"quant_dropped": dropped.perturbed(inputs["z"], draws), "quant_corrupted": codes,
            "tokens_corrupted": corrupted.ids(codes)}


def masks(case: Case) -> dict[str, Any]:
    """Samples are batched here, not packed; what a packed mask allows is put together from our rules per sample."""
    lengths, prefixes, contexts = (case.inputs[name].tolist() for name in ("seq_lens", "prefix_lens", "ctx_lens"))
    size = -(-sum(lengths) // case.config["pad_to_multiple"]) * case.config["pad_to_multiple"]
    columns = -(-sum(contexts) // case.config["pad_to_multiple"]) * case.config["pad_to_multiple"]
    outputs = {name: torch.zeros(size, size) for name in ("full", "causal", "causal_last")}
    outputs |= {"seq_ids": torch.full((size,), -1), "cross": torch.zeros(size, columns)}
    start = at = 0
    for index, (length, prefix, context) in enumerate(zip(lengths, prefixes, contexts)):
        rows = slice(start, start + length)
        outputs["seq_ids"][rows] = index
        outputs["full"][rows, rows] = 1
        outputs["causal"][rows, rows] = torch.ones(length, length).tril()
        outputs["cross"][rows, at:at + context] = 1
        encoder = RegisterEncoder(channels=1, patch_size=1, position_grid=(1, prefix), position_scaling="absolute",
                                  registers=length - prefix, out_channels=1, width=4, depth=0, head_dim=4, mlp_ratio=1)
        outputs["causal_last"][rows, rows] = encoder.embed(torch.zeros(1, 1, 1, prefix))[1].float()
        start, at = start + length, at + context
    return outputs


def posemb(case: Case) -> dict[str, Any]:
    channels, base = case.config["embed_dim"], case.config["temperature"]
    square = sincos_table(*case.config["max_sizes"], channels, base)
    crop, interp = case.outputs["crop"].shape[-2:], case.outputs["interp"].shape[-2:]
    return {"square": square, "nonsquare": sincos_table(*case.outputs["nonsquare"].shape[-2:], channels, base),
            "crop": fit_table(square, crop, "absolute"), "interp": fit_table(square, interp, "interpolate")}


def timestep_embedding(case: Case) -> dict[str, Any]:
    config = case.config
    sinusoid = time_features(case.inputs["t"], config["frequency_embedding_size"], config["max_timestep"],
                             config["max_period"])
    prefix = next(iter(case.state_dict)).split("mlp.")[0]
    weights = {name.removeprefix(prefix): value for name, value in case.state_dict.items()}
    hidden = F.silu(F.linear(sinusoid, weights["mlp.0.weight"], weights["mlp.0.bias"]))
    return {"sinusoid": sinusoid, "temb": F.linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"])}


@torch.no_grad()
def encode(case: Case) -> dict[str, Any]:
    encoder, quantizer, latents = encoder_of(case), quantizer_of(case), case.inputs["latents"]
    x, mask = encoder.embed(latents)
    before = encoder(latents)
    codes = quantizer(before)
    return {"packed_in": x, "block0": encoder.blocks[0](x, mask), "latents_pre_quant": before, "quants": codes,
            "tokens": quantizer.ids(codes)}


@torch.no_grad()
def encode_ragged(case: Case) -> dict[str, Any]:
    encoder, quantizer, outputs = encoder_of(case), quantizer_of(case), {}
    for index, count in enumerate(case.inputs["register_sizes"].tolist()):
        before = encoder(case.inputs[f"latents_{index}"], count)
        outputs |= {f"pre_quant_{index}": before, f"tokens_{index}": quantizer.ids(quantizer(before))}
    return outputs


@torch.no_grad()
def velocity(case: Case) -> dict[str, Any]:
    decoder, quantizer, inputs = decoder_of(case), quantizer_of(case), case.inputs
    layers = case.config["decoder"]["module_dict"]["dec_transformer"].get("intermediate_layers", [None])
    registers = decoder.registers(quantizer.codes(inputs["tokens"]), inputs["keep_k"], inputs["drop"])
    result, features = decoder(inputs["x_t"], inputs["t"], registers, features_after=layers[0])
    outputs = {"velocity": result, "repa_patches": features}
    if not decoder.single_null:  # one token stands for the dropped ones: written out again
        rows = [torch.cat([tokens[:-1][counts[:-1] > 0], tokens[-1:].expand(int(counts[-1]), -1)])
                for tokens, counts in zip(registers.tokens, registers.counts)]
        outputs["packed_in"] = torch.cat([decoder.patches(inputs["x_t"]), torch.stack(rows)], dim=1)
    return outputs


def noise_module(case: Case) -> dict[str, Any]:
    inputs, outputs = case.inputs, {}
    laws = {"logit_normal": (LogitNormal(), "n"), "stratified": (StratifiedLogitNormal(), "u"),
            "uniform": (Uniform(), "u"), "mode": (Mode(case.config["mode_scale"]), "u")}
    for name, (law, drawn) in laws.items():
        sigma = law.draw(given(noise_level=inputs[drawn]))
        outputs |= {f"sigma_{name}": sigma,
                    f"x_t_{name}": torch.lerp(inputs["x0"], inputs["noise"], sigma[:, None, None, None])}
    return outputs


def train_step(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    latents, tokenizer = inputs["latents"], tokenizer_of(case, inputs["latents"])
    sigma = tokenizer.noise_levels.draw(given(noise_level=inputs["draw"]))
    codes = tokenizer.quantizer(tokenizer.encoder(latents))
    predicted, _ = tokenizer.flow(latents, inputs["noise"], sigma, codes, inputs["keep_k"],
                                  inputs["null_draw"] < tokenizer.null_drop)
    losses = flow_loss(predicted, latents, inputs["noise"])
    losses.mean().backward()
    grads = tokenizer.key_maps()["flextok"].to_official(
        {name: parameter.grad for name, parameter in tokenizer.named_parameters() if parameter.grad is not None})
    return {"loss": losses.mean(), "loss_per_sample": losses, "tokens": tokenizer.ids(latents), "sigma": sigma,
            "velocity": predicted} | {f"grad:{name}": grad for name, grad in grads.items()}


def guidance(case: Case) -> dict[str, Any]:
    config, cond, uncond = case.config, case.inputs["cond"], case.inputs["uncond"]
    scale = config["guidance_scale"]

    def run(way: Guidance) -> Tensor:
        guide = way.begin()
        return torch.stack([guide(c, u, 0.5) for c, u in zip(cond, uncond)])

    plain = AdaptiveProjected(scale=scale, momentum=0.0, parallel=0.5, threshold=0.0).begin()
    return {"cfg": run(ClassifierFree(scale=scale)), "apg_plain": plain(cond[0], uncond[0], 0.5),
            "apg": run(AdaptiveProjected(scale=scale, momentum=config["momentum"], parallel=config["eta"],
                                         threshold=config["norm_threshold"]))}


def named_guidance(text: str) -> Guidance:
    """"guidance_scale=1", "CFG 2.5", "APG 7.5" or "APG with scale(t)=1+4t", as a case's `variants` say it."""
    law = re.search(r"scale\(t\)\s*=\s*([\d.]+)\s*\+\s*([\d.]+)\s*\*?\s*t", text)
    if law:
        first, slope = map(float, law.groups())
        scale = lambda time: first + slope * time  # noqa: E731
    else:
        scale = float(re.search(r"\d+(\.\d+)?", text)[0])
    return (AdaptiveProjected if "APG" in text else ClassifierFree)(scale=scale)


@torch.no_grad()
def decode(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    tokenizer = tokenizer_of(case, inputs["noise"])
    kept = {name: [int(k) for k in re.findall(r"\d+", value)]
            for name, value in re.findall(r"(k\w+): (\[[\d, ]+\]|\d+)", case.meta["call"])}
    outputs = {}
    for name in case.outputs:
        way, _, k = name.rpartition("_")
        lengths = kept[k] if len(kept[k]) > 1 else kept[k] * len(inputs["tokens"])
        prefixes = [ids[:length] for ids, length in zip(inputs["tokens"], lengths)]
        outputs[name] = tokenizer.decode_latents(
            prefixes, given(decoder_noise=inputs["noise"]), steps=case.config["timesteps"],
            guidance=named_guidance(case.config["variants"][way]))
    return outputs


@torch.no_grad()
def end_to_end(case: Case) -> dict[str, Any]:
    inputs, call = case.inputs, case.meta["call"]
    tokenizer = tokenizer_of(case, inputs["noise"])
    latents, tokens = tokenizer.latents(inputs["images"]), tokenizer.encode(inputs["images"])
    lengths = [int(k) for k in re.findall(r"\d+", re.search(r"k=\[([\d, ]+)\]", call)[1])]
    options = {"lengths": lengths, "steps": int(re.search(r"(\d+) Euler steps", call)[1]),
               "guidance": AdaptiveProjected(scale=float(re.search(r"APG scale ([\d.]*\d)", call)[1]))}
    draws = given(decoder_noise=inputs["noise"])
    return {"vae_latents": latents, "tokens": tokens, "vae_reconst": tokenizer.images(latents),
            "latents": tokenizer.decode_latents(tokens, draws, **options),
            "images": tokenizer.decode(tokens, draws, **options)}


def nested_dropout(case: Case) -> dict[str, Any]:
    count = case.config["N"]
    rounded = torch.tensor(NestedDropout("rounded_up", count).choices)
    uniform, powers = NestedDropout("uniform", count).choices, NestedDropout("powers_of_two", count).choices
    chances = rounded.bincount(minlength=count + 1)[1:] / len(rounded)
    return {"uniform_pow2_keep": rounded, "pow2_choices": powers, "uniform_range": [uniform[0], uniform[-1]],
            "uniform_pow2_prob": chances,
            "registers_pow2": powers_of_two(case.config["registers_n_min"], case.config["registers_n_max"])}


KINDS = {
    "flextok/fsq": fsq,
    "flextok/fsq_train": fsq_train,
    "flextok/masks": masks,
    "flextok/posemb": posemb,
    "flextok/timestep_embedding": timestep_embedding,
    "flextok/encoder": encode,
    "flextok/encoder_ragged": encode_ragged,
    "flextok/decoder_velocity": velocity,
    "flextok/decoder_velocity_single_null": velocity,
    "flextok/noise_module": noise_module,
    "flextok/train_step": train_step,
    "flextok/guidance": guidance,
    "flextok/decode": decode,
    "flextok/end_to_end": end_to_end,
    "flextok/nested_dropout": nested_dropout,
}
