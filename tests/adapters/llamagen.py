"""LlamaGen: the transformer, its sampling, and the whole pipeline."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.adapters.tokenizers import vq_tokenizer
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import AnyDraws, Draws, Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, FirstSteps, Schedule
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.llamagen import LlamaGen
from varzoo.loading import Model
from varzoo.nn.rotary import axial_table, line_table, rotate, zero_rows
from varzoo.predictions.categorical import Categorical
from varzoo.samplers import Autoregressive


def build(config: dict[str, Any], state: dict[str, Tensor]) -> LlamaGen:
    side = int(config["block_size"] ** 0.5 + 0.5)
    width, drop = config["dim"], config.get("class_dropout_prob", 0.1)
    if config.get("model_type", "c2i") == "t2i":
        conditioner = TextPrefix(length=config["cls_token_num"], channels=config.get("caption_dim", 2048), width=width,
                                 drop=drop)
    else:
        conditioner = ClassPrefix(num_classes=config["num_classes"], width=width, drop=drop)
    model = LlamaGen(spec=TokenSpec(kind="discrete", shape=(side, side), size=config["vocab_size"]),
                     conditioner=conditioner, width=width, depth=config["n_layer"], heads=config["n_head"],
                     multiple_of=config.get("multiple_of", 256), norm_eps=config.get("norm_eps", 1e-5),
                     token_dropout=config.get("token_dropout_p", 0.1),
                     attention_dropout=config.get("resid_dropout_p", 0.1), mlp_dropout=config.get("ffn_dropout_p", 0.1))
    load_strictly(model, model.key_maps()["llamagen"].to_ours(state), "the golden state dict")
    return model.eval()


def condition_of(case: Case) -> Condition:
    if "captions" in case.inputs:
        return Condition.text(case.inputs["captions"], case.inputs["emb_mask"])
    return Condition.classes(case.inputs["labels"])


def said(case: Case, before: str) -> float:
    """The number after some words of the case: a setting that stands nowhere else, as in "cfg_interval=5"."""
    return float(re.search(rf"\b{before}(\d+(\.\d+)?)", case.meta["call"])[1])


def forward(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict)
    return {"logits": model(case.inputs["tokens"], condition_of(case))}


def train(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict).train()
    tokens, condition = case.inputs["tokens"], condition_of(case)
    draws = RecordedDraws({"drop_condition": Recorded(case.inputs["drop_u"], "batch")}, tuple(range(len(tokens))))
    losses = model.loss(Batch(tokens=tokens, condition=condition, weights=case.inputs.get("valid")), draws, 0.0)
    losses.total.backward()
    official = model.key_maps()["llamagen"].to_official(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    dropped = case.inputs["drop_u"] < model.conditioner.drop
    logits = model(tokens[:, :-1], condition, dropped)[:, model.conditioner.length - 1:]
    return {"loss": losses.total, "logits": logits} | {f"grad.{name}": grad for name, grad in official.items()}


def generate(model: LlamaGen, condition: Condition, guidance: Schedule | None, draws: AnyDraws,
             **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, guided logits and the number of ids that survived the filters, by the plain sampler."""
    logits, kept = [], []

    class Recording(Categorical):
        def draw(self, draws: AnyDraws, **options: Any) -> Any:
            logits.append(self.logits)
            kept.append((self.filtered(**options).softmax(-1) > 0).sum(-1))
            return super().draw(draws, **options)

    begin = model.begin

    def recording_begin(*args: Any, **kwargs: Any) -> Any:
        decoding = begin(*args, **kwargs)
        predict = decoding.predict
        decoding.predict = lambda step: Recording(**vars(predict(step)))
        return decoding

    model.begin = recording_begin
    sampled = Autoregressive(guidance=guidance, draw=options).sample(model, condition, draws)
    model.begin = begin
    return sampled.tokens, torch.cat(logits, dim=1), torch.cat(kept, dim=1)


def c2i_generate(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict)
    condition, draws = condition_of(case), Draws(0, tuple(range(len(case.inputs["labels"]))))
    last = int(said(case, r"cfg_interval=")) + 1
    settings = {"guided": Constant(said(case, r"guided: s=")), "unguided": None,
                "interval": FirstSteps(said(case, r"interval: s="), last=last)}
    outputs = {}
    for name, guidance in settings.items():
        tokens, logits, _ = generate(model, condition, guidance, draws, temperature=0.0)
        outputs |= {f"tokens_{name}": tokens, f"logits_{name}": logits}
    return outputs


def c2i_generate_sampled(case: Case) -> dict[str, Any]:
    model, sampling = build(case.config["model"], case.state_dict), case.config["sampling"]
    draws = RecordedDraws({"token": Recorded(case.inputs["u"], "batch pos")}, tuple(range(len(case.inputs["u"]))))
    scale, interval = sampling["cfg_scale"], sampling.get("cfg_interval", -1)
    guidance = FirstSteps(scale, last=interval + 1) if interval > -1 else Constant(scale)
    tokens, logits, kept = generate(model, condition_of(case), guidance, draws, temperature=sampling["temperature"],
                                    top_k=sampling["top_k"], top_p=sampling["top_p"])
    return {"tokens": tokens, "logits": logits, "kept": kept}


def t2i_generate(case: Case) -> dict[str, Any]:
    model = build(case.config, case.state_dict)
    condition = condition_of(case)
    tokens, logits, _ = generate(model, condition, Constant(said(case, "cfg_scale=")), Draws(0, range(condition.size)),
                                 temperature=0.0)
    return {"tokens": tokens, "logits": logits}


def rope2d(case: Case) -> dict[str, Any]:
    side, head_dim, base, prefix = (case.config[key] for key in ("grid_size", "head_dim", "base", "cls_token_num"))
    table = torch.cat([zero_rows(prefix, head_dim), axial_table((side, side), head_dim, base)])
    line = torch.cat([zero_rows(prefix, head_dim), line_table(len(case.outputs["table_1d"]) - prefix, head_dim, base)])
    return {"table": table, "rotated": rotate(case.inputs["x"], table), "table_1d": line}


def sampling_filters(case: Case) -> dict[str, Any]:
    logits = case.inputs["logits"][:, -1:]
    prediction = Categorical(logits=logits, positions=torch.zeros(len(logits), 1, dtype=torch.long))
    return {f"probs_{i}": prediction.filtered(**combo).softmax(-1)[:, 0]
            for i, combo in enumerate(case.config["combos"])}


def top_k_top_p(case: Case) -> dict[str, Any]:
    logits = case.inputs["logits"][:, None]
    prediction = Categorical(logits=logits, positions=torch.zeros(len(logits), 1, dtype=torch.long))
    return {f"keep_{i}": prediction.filtered(**combo)[:, 0].isfinite()
            for i, combo in enumerate(case.config["combos"])}


def pipeline(case: Case) -> dict[str, Any]:
    config, own = case.config, ("cls_embedding.", "tok_embeddings.", "layers.", "norm.", "output.")
    mine = {name: value for name, value in case.state_dict.items() if name.startswith(own)}
    generator = build(config["gpt"], mine)
    rest = [entry for entry in case.meta["params"] if not entry[0].startswith(own)]
    factor = 2 ** (len(config["vq"]["vq"]["decoder_ch_mult"]) - 1)
    tokenizer = vq_tokenizer(replace(case, meta={**case.meta, "config": config["vq"], "params": rest}),
                             image_size=tuple(side * factor for side in generator.spec.shape)).eval()
    sampler = Autoregressive(guidance=Constant(config["cfg_scale"]), draw={"temperature": 0.0})
    condition = condition_of(case)
    tokens = sampler.sample(generator, condition, Draws(0, range(condition.size))).tokens
    images, _ = Model(tokenizer=tokenizer, generator=generator, sampler=sampler).sample(condition)
    return {"tokens": tokens, "image": tokenizer.decode(tokens), "uint8": images}


KINDS = {
    "llamagen/pipeline": pipeline,
    "llamagen/c2i_forward": forward,
    "llamagen/t2i_forward": forward,
    "llamagen/c2i_train": train,
    "llamagen/t2i_train": train,
    "llamagen/c2i_generate": c2i_generate,
    "llamagen/c2i_generate_sampled": c2i_generate_sampled,
    "llamagen/t2i_generate": t2i_generate,
    "llamagen/rope2d": rope2d,
    "llamagen/sampling_filters": sampling_filters,
    "nar/top_k_top_p": top_k_top_p,
}
