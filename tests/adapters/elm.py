"""ELM: the autoregressive and the masked model, and the binary autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.adapters.llamagen import generate
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws, Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import RISES, Rise
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import guide
from varzoo.generators.conditioners import ClassPrefix
from varzoo.generators.elm import ELM, MaskedELM
from varzoo.generators.masked import ConfidencePlan
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.binary import BinaryTokenizer, pack_bits, unpack_bits


def build(kind: type, config: dict[str, Any], state: dict[str, Tensor], **settings: Any) -> ELM | MaskedELM:
    side = int(config["block_size"] ** 0.5 + 0.5)
    model = kind(
        spec=TokenSpec(kind="discrete", shape=(side, side), size=2 ** config["code_dim"], depth=config["token_each"]),
        conditioner=ClassPrefix(num_classes=config["num_classes"], width=config["dim"], drop=0.1), width=config["dim"],
        depth=config["n_layer"], heads=config["n_head"], multiple_of=config["multiple_of"], norm_eps=1e-5,
        token_dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1, **settings)
    load_strictly(model, model.key_maps()["elm"].to_ours(state), "golden case")
    return model.eval()


def shaped(model: ELM | MaskedELM, indices: Tensor) -> Tensor:
    """Official ids `[B, L, T]` as ours."""
    return indices[..., 0] if model.spec.depth == 1 else indices


def stacked(tokens: Tensor) -> Tensor:
    """Ours as official ids `[B, L, T]`."""
    return tokens[..., None] if tokens.ndim == 2 else tokens


@torch.no_grad()
def ar_forward(case: Case) -> dict[str, Any]:
    model = build(ELM, case.config, case.state_dict)
    tokens, condition = shaped(model, case.inputs["indices"]), Condition.classes(case.inputs["labels"])
    draws = RecordedDraws({"drop_condition": Recorded(torch.ones(len(tokens)), "batch")}, tuple(range(len(tokens))))
    logits = model.logits(tokens, condition)
    return {"logits": logits.flatten(1, -2), "loss": model.loss(Batch(tokens=tokens, condition=condition), draws,
                                                               0.0).total}


def ar_sample(case: Case) -> dict[str, Any]:
    config = case.config
    model = build(ELM, config, case.state_dict)
    condition = Condition.classes(case.inputs["labels"])
    tokens, _, _ = generate(model, condition, Rise(config["cfg_scale"], config["cfg_schedule"]),
                            Draws(0, range(condition.size)), temperature=config["temperature"], top_k=config["top_k"])
    steps = list(model.begin(condition, draws=Draws(0, range(condition.size))).planned)
    return {"indices": stacked(tokens)} | {
        f"cfg_{law}": torch.tensor([Rise(config["cfg_scale"], law)(step) for step in steps], dtype=torch.float64)
        for law in RISES}


def ar_sample_sampled(case: Case) -> dict[str, Any]:
    sampling, model = case.config["sampling"], build(ELM, case.config["model"], case.state_dict)
    condition, uniforms = Condition.classes(case.inputs["labels"]), shaped(model, case.inputs["u"])
    guidance = Rise(sampling["cfg_scale"], sampling["cfg_schedule"])
    draws = RecordedDraws({"token": Recorded(uniforms, "batch pos")}, tuple(range(condition.size)))
    tokens, logits, _ = generate(model, condition, guidance, draws, temperature=sampling["temperature"],
                                 top_k=sampling["top_k"])
    steps = model.begin(condition, draws=draws).planned
    return {"indices": stacked(tokens), "logits": logits if logits.ndim == 4 else logits[..., None, :],
            "w": [guidance(step) for step in steps]}


@torch.no_grad()
def mlm_forward(case: Case) -> dict[str, Any]:
    model = build(MaskedELM, case.config, case.state_dict, mask_steps=10, smoothing=case.config["smoothing"])
    tokens, masked = shaped(model, case.inputs["indices"]), case.inputs["mask"].bool()
    logits = model.logits(tokens, masked, Condition.classes(case.inputs["labels"]))
    per_sample, counts = model.masked_loss(tokens, logits, masked), masked.sum(1)
    # The official mean is over the masked ids of the batch; in training every sample has equally many.
    return {"logits": logits.flatten(1, -2), "loss": (per_sample * counts).sum() / counts.sum()}


def mlm_sample(case: Case) -> dict[str, Any]:
    config = case.config.get("model", case.config)
    sampling = case.config.get("sampling", case.config)
    model = build(MaskedELM, config, case.state_dict, mask_steps=10, smoothing=0.0)
    condition = Condition.classes(case.inputs["labels"])
    arrays, options = {}, {"temperature": 0.0}
    if "u" in case.inputs:
        arrays, options = {
            "token": Recorded(shaped(model, case.inputs["u"].unflatten(-1, (-1, model.spec.depth))),
                              "redraw batch pos"),
            "confidence": Recorded(shaped(model, case.inputs["gumbel"]), "redraw batch pos")}, {}
    fed, log_probs, begin = [], [], model.begin

    def recording_begin(*args: Any, **settings: Any) -> Any:
        decoding = begin(*args, **settings)
        predict = decoding.predict

        def recording_predict(step: Any) -> Any:
            prediction = predict(step)
            fed.append(stacked(decoding.tokens).masked_fill(decoding._masked[..., None], model.spec.size))
            logits = torch.cat([model.logits(decoding.tokens, decoding._masked, each)
                                for each in decoding._conditions])
            log_probs.append(guide(logits, decoding.guidance(step)).log_softmax(-1).flatten(1, -2))
            return prediction

        decoding.predict = recording_predict
        return decoding

    model.begin = recording_begin
    sampler = Autoregressive(guidance=Rise(sampling["cfg_scale"], sampling["cfg_schedule"]), draw=options,
                             plan=ConfidencePlan(steps=sampling["num_iter"], noise=sampling["temperature"]))
    tokens = sampler.sample(model, condition, RecordedDraws(arrays, tuple(range(condition.size)))).tokens
    return {"indices": stacked(tokens), "fed": torch.stack(fed), "log_probs_first": log_probs[0],
            "log_probs_last": log_probs[-1]}


def bits(case: Case) -> dict[str, Any]:
    groups, rows = case.config["token_each"], rearrange(case.inputs["bits"], "b c h w -> b (h w) c")
    ids = pack_bits(rows, groups)
    assert torch.equal(unpack_bits(ids, groups, rows.shape[-1]), rows)
    return {"indices": stacked(ids)}


def bae_of(config: dict[str, Any], state: dict[str, Tensor]) -> BinaryTokenizer:
    levels = range(len(config["ch_mult"]))
    tokenizer = BinaryTokenizer(
        image_size=config["img_size"], width=config["nf"], multipliers=config["ch_mult"],
        blocks_per_level=config["res_blocks"], decoder_blocks_per_level=int(config["res_blocks"] * config["gen_mul"]),
        attention_levels=[level for level in levels if config["img_size"] >> level in config["attn_resolutions"]],
        channels=config["emb_dim"], bits=config["codebook_size"], groups=1, input_norm=config["norm_first"],
        deterministic=config["deterministic"], undecided=0.0, uint8_rule="round")
    load_strictly(tokenizer, tokenizer.key_maps()["elm"].to_ours(state), "golden case")
    return tokenizer.eval()


@torch.no_grad()
def bae(case: Case) -> dict[str, Any]:
    tokenizer = bae_of(case.config, case.state_dict)
    probabilities = tokenizer.compress(2 * case.inputs["x"] - 1)
    drawn = unpack_bits(tokenizer.tokens(probabilities), 1, probabilities.shape[-1])
    grid = lambda rows: rearrange(rows, "b (h w) c -> b c h w", h=tokenizer.spec.shape[0])  # noqa: E731
    return {"probs": grid(probabilities), "bits": grid(drawn), "quant": tokenizer.vectors(drawn.float()),
            "image": (tokenizer.decode(tokenizer.tokens(probabilities)) + 1) / 2}


KINDS = {
    "elm/bits": bits,
    "elm/bae": bae,
    "elm/ar_forward": ar_forward,
    "elm/ar_sample": ar_sample,
    "elm/ar_sample_sampled": ar_sample_sampled,
    "elm/mlm_forward": mlm_forward,
    "elm/mlm_sample": mlm_sample,
    "elm/mlm_sample_sampled": mlm_sample,
}
