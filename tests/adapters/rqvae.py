"""RQ-VAE and RQ-Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.nn.residual_quantizer import ResidualQuantizer
from varzoo.predictions.categorical import Categorical
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
    import re

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


KINDS = {
    "rqvae/autoencoder": autoencoder,
    "rqvae/quantizer_folded": quantizer_folded,
    "rqvae/ema_shared_restart": ema,
    "rqvae/ema_separate_norestart": ema,
    "rqvae/sampling_filters": sampling_filters,
}
