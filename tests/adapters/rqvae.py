"""RQ-VAE and RQ-Transformer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Draws, Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Batch, Condition
from varzoo.generators.causal import cross_entropy
from varzoo.generators.conditioners import CaptionPrefix, ClassPrefix
from varzoo.generators.rq import RQTransformer
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.residual_quantizer import ResidualQuantizer
from varzoo.predictions.categorical import Categorical
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.rq import (
    RQTokenizer,
    commitment_loss,
    fold_latents,
    straight_through,
    unfold_latents,
)


def codebook_state(state: dict[str, Tensor], depth: int, shared: bool, prefix: str = "") -> dict[str, Tensor]:
    """The official state dict with the codebooks' statistics as they begin, and the names of a shared codebook."""
    full = dict(state)
    for level in range(depth):
        name = f"{prefix}codebooks.{level}"
        weight = state[f"{prefix}codebooks.{0 if shared else level}.weight"]
        full |= {f"{name}.weight": weight, f"{name}.embed_ema": weight[:-1].clone(),
                 f"{name}.cluster_size_ema": torch.zeros(len(weight) - 1)}
    return full


def tokenizer_of(config: dict[str, Any], state: dict[str, Tensor]) -> RQTokenizer:
    network, (height, width, channels) = config["ddconfig"], config["latent_shape"]
    factor = 2 ** (len(network["ch_mult"]) - 1)
    tokenizer = RQTokenizer(
        image_size=(height * factor, width * factor), width=network["ch"], multipliers=network["ch_mult"],
        blocks_per_level=network["num_res_blocks"],
        attention_levels=[level for level in range(len(network["ch_mult"]))
                          if network["resolution"] >> level in network["attn_resolutions"]],
        z_channels=network["z_channels"], latent_channels=channels,
        fold=(height // config["code_shape"][0], width // config["code_shape"][1]), codebook_size=config["n_embed"],
        depth=config["code_shape"][2], shared=config["shared_codebook"], decay=config["decay"],
        restart=config["restart_unused_codes"], commitment=config["latent_loss_weight"], temperature=0.5,
        uint8_rule="round")
    official = codebook_state(state, tokenizer.spec.depth, config["shared_codebook"], "quantizer.")
    load_strictly(tokenizer, tokenizer.key_maps()["rqvae"].to_ours(official), "golden case")
    return tokenizer.eval()


def quantizer_of(case: Case, *, channels: int, depth: int, decay: float = 0.99,
                 restart: bool = False) -> ResidualQuantizer:
    shared = case.config["shared_codebook"]
    quantizer = ResidualQuantizer(size=case.config["n_embed"], channels=channels, depth=depth, shared=shared,
                                  decay=decay, restart=restart)
    for level, book in enumerate(quantizer.codebooks):
        book.vectors.copy_(case.state_dict[f"codebooks.{level}.weight"][:-1])
        book.sums.copy_(book.vectors)
    return quantizer


@torch.no_grad()
def autoencoder(case: Case) -> dict[str, Any]:
    tokenizer, images = tokenizer_of(case.config, case.state_dict), case.inputs["images"]
    grid, levels = tokenizer.spec.shape, range(1, tokenizer.spec.depth + 1)
    latents = tokenizer.compress(images)
    tokens = tokenizer.tokens(latents)
    stacked = tokens if tokens.ndim == 3 else tokens[..., None]
    recon, losses = tokenizer.reconstruction_losses(images, RecordedDraws({}, tuple(range(len(images)))))
    error = (tokenizer.decode(tokens) - images).square().mean()
    torch.testing.assert_close(recon, tokenizer.decode(tokens), atol=1e-4, rtol=1e-4)
    outputs = {
        "z_e": latents.unflatten(1, grid), "codes": stacked.unflatten(1, grid),
        "z_q": tokenizer.embed(tokens).sum(-2).unflatten(1, grid), "recon": tokenizer.decode(tokens),
        "commit": losses.total / tokenizer.commitment, "loss_recon": error, "loss_total": error + losses.total,
        "partial_add": torch.stack([tokenizer.preview(tokens, level) for level in levels]),
        "emb_depth": tokenizer.embed(tokens).unflatten(1, grid),
        "soft": tokenizer.quantizer.soft(latents, stacked, 0.5).unflatten(1, grid)}
    for name in case.outputs:
        if name.startswith("partial_select_"):
            outputs[name] = tokenizer.preview(tokens, int(name.rsplit("_", 1)[1]) + 1, "select")
    return outputs


def quantizer_folded(case: Case) -> dict[str, Any]:
    (height, width, channels), (h, w, depth) = case.config["latent_shape"], case.config["code_shape"]
    fold = (height // h, width // w)
    quantizer = quantizer_of(case, channels=channels * fold[0] * fold[1], depth=depth)
    x = case.inputs["x"].clone().requires_grad_()
    folded = fold_latents(x.permute(0, 3, 1, 2), fold)
    quantised = quantizer(folded.detach())
    unfold = lambda vectors: unfold_latents(vectors, fold, (h, w)).permute(0, 2, 3, 1)  # noqa: E731
    output, commit = unfold(straight_through(folded, quantised)), commitment_loss(folded, quantised)
    ((output * case.inputs["g"]).sum() + 0.25 * commit).backward()
    return {"folded": folded.unflatten(1, (h, w)), "codes": quantised.ids.unflatten(1, (h, w)),
            "cumulative": quantised.partial_sums.unflatten(2, (h, w)), "quantized": output, "commit": commit,
            "grad_x": x.grad}


def ema(case: Case) -> dict[str, Any]:
    config, x = case.config, case.inputs["x"]
    quantizer = quantizer_of(case, channels=config["D"], depth=config["depth"], decay=config["decay"],
                             restart=config["restart_unused_codes"])
    for book, counts in zip(quantizer.codebooks, case.inputs["cluster_size"], strict=True):
        book.counts.copy_(counts)
        book.sums.copy_(book.vectors * counts[:, None])
    recorded = {name: Recorded(case.inputs[theirs], "level") for name, theirs in
                (("restart_order", "perm"), ("restart_noise", "tile_noise")) if theirs in case.inputs}
    grid = x.shape[1:3]
    vectors = x.flatten(1, 2)
    quantised = quantizer(vectors, RecordedDraws(recorded, tuple(range(len(x)))))
    stack = lambda name: torch.stack([getattr(book, name) for book in quantizer.codebooks])  # noqa: E731
    return {"codes": quantised.ids.unflatten(1, grid), "quantized": quantised.partial_sums[-1].unflatten(1, grid),
            "commit": commitment_loss(vectors, quantised), "weight": stack("vectors"),
            "cluster_size_ema": stack("counts"), "embed_ema": stack("sums")}


def sampling_filters(case: Case) -> dict[str, Any]:
    """An output's name says its settings: t07 is temperature 0.7, k9 top-k 9, p06 top-p 0.6, p1 top-p 1."""
    logits = case.inputs["logits"][:, None]
    prediction = Categorical(logits=logits, positions=torch.zeros(len(logits), 1, dtype=torch.long))
    outputs = {}
    for name in case.outputs:
        given = {letter: (float(f"{digits[0]}.{digits[1:] or 0}") if letter != "k" else int(digits))
                 for letter, digits in re.findall(r"([tkp])(\d+)", name)}
        outputs[name] = prediction.filtered(
            temperature=given.get("t", 1.0), top_k=given.get("k", 0), top_p=given.get("p", 1.0),
            filters=("top_k", "top_p_strict")).softmax(-1)[:, 0]
    return outputs


def transformer_of(config: dict[str, Any], state: dict[str, Tensor]) -> RQTransformer:
    height, width, depth = config["block_size"]
    length, vocabulary = config["block_size_cond"], config["vocab_size_cond"]
    conditioner = (ClassPrefix(num_classes=vocabulary, width=config["embed_dim"], drop=0.0) if length == 1
                   else CaptionPrefix(length=length, vocabulary=vocabulary, width=config["embed_dim"]))
    by_codebook = config.get("input_emb_vqvae", False)
    assert by_codebook == config.get("head_emb_vqvae", False), "body and head embed codes alike"
    model = RQTransformer(
        spec=TokenSpec(kind="discrete", shape=(height, width), size=config["vocab_size"], depth=depth),
        conditioner=conditioner, width=config["embed_dim"], body_depth=config["body"]["n_layer"],
        body_heads=config["body"]["block"]["n_head"], head_depth=config["head"]["n_layer"],
        head_heads=config["head"]["block"]["n_head"],
        code_channels=config["input_embed_dim"] if by_codebook else None, shared_table=config["shared_tok_emb"],
        cumulative=config.get("cumsum_depth_ctx", False), shared_classifier=config["shared_cls_emb"], dropout=0.1)
    books = [state[name][:-1] for name in sorted(state) if name.startswith("quantizer.codebooks.")
             and name.endswith("weight")]
    own = {name: value for name, value in state.items() if not name.startswith("quantizer.")}
    load_strictly(model, model.key_maps()["rqvae"].to_ours(own), "golden case")
    if by_codebook:
        model.use_codebook(torch.stack(books) if len(books) > 1 else books[0])
    return model.eval()


def condition_of(model: RQTransformer, cond: Tensor) -> Condition:
    return Condition.classes(cond.flatten()) if model.num_classes is not None else Condition.captions(cond)


@torch.no_grad()
def transformer(case: Case) -> dict[str, Any]:
    model = transformer_of(case.config, case.state_dict)
    codes, condition = case.inputs["codes"], condition_of(model, case.inputs["cond"])
    tokens, grid = codes.flatten(1, 2), codes.shape[1:3]
    batch = Batch(tokens=tokens, condition=condition)
    draws = RecordedDraws({"drop_condition": Recorded(torch.ones(len(codes)), "batch")}, tuple(range(len(codes))))
    losses = model.loss(batch, draws, 0.0)
    logits, states = model.logits(tokens, condition), model._contexts(tokens, condition, None)[1]
    outputs = {"logits": logits.unflatten(1, grid), "ce": losses.parts["cross_entropy"],
               "ce_per_depth": torch.stack([cross_entropy(logits[:, :, level], tokens[..., level]).mean()
                                            for level in range(model.levels)])}
    if condition.ids is not None:
        outputs |= {"cond_logits": model.caption_logits(states), "cond_ce": losses.parts["caption"]}
    if "greedy" in case.outputs:
        outputs["greedy"] = greedy(model, condition).unflatten(1, grid)
    soft = case.inputs.get("soft_target")
    if soft is not None:
        soft = soft.flatten(1, 2)
        outputs["soft_ce"] = model.loss(replace(batch, extras={"soft_targets": soft}), draws,
                                        0.0).parts["cross_entropy"]
    return outputs


def greedy(model: RQTransformer, condition: Condition) -> Tensor:
    draws = Draws(0, tuple(range(condition.size)))
    return Autoregressive(draw={"temperature": 0.0}).sample(model, condition, draws).tokens


def transformer_sample(case: Case) -> dict[str, Any]:
    config, sampling = case.config.get("model", case.config), case.config.get("sampling", {"top_k": 1})
    model = transformer_of(config, case.state_dict)
    condition, (height, width, depth) = condition_of(model, case.inputs["cond"]), config["block_size"]
    logits, kept, next_logits = [], [], model.next_logits

    def recording(context: Tensor, ids: Tensor, cache: KVCache) -> Tensor:
        logits.append(next_logits(context, ids, cache))
        level = ids.shape[-1]
        at = {name: value[level] if isinstance(value, list) else value for name, value in sampling.items()}
        kept.append((Categorical(logits=logits[-1], positions=torch.zeros(1)).filtered(
            filters=("top_k", "top_p_strict"), **at).softmax(-1) > 0).sum(-1))
        return logits[-1]

    model.next_logits = recording
    draws = RecordedDraws({"token": Recorded(case.inputs["u"].flatten(1, 2), "batch pos level")} if "u" in case.inputs
                          else {}, tuple(range(condition.size)))
    settings = sampling if "u" in case.inputs else {"temperature": 0.0}
    tokens = Autoregressive(draw=settings).sample(model, condition, draws).tokens
    grid = lambda values: torch.cat(values, dim=1).unflatten(1, (height, width, depth))  # noqa: E731
    return {"codes": tokens.unflatten(1, (height, width)), "logits": grid(logits), "kept": grid(kept)}


KINDS = {
    "rqvae/transformer_class": transformer,
    "rqvae/transformer_text": transformer,
    "rqvae/transformer_class_sample": transformer_sample,
    "rqvae/transformer_class_sampled": transformer_sample,
    "rqvae/autoencoder": autoencoder,
    "rqvae/quantizer_folded": quantizer_folded,
    "rqvae/ema_shared_restart": ema,
    "rqvae/ema_separate_norestart": ema,
    "rqvae/sampling_filters": sampling_filters,
}
