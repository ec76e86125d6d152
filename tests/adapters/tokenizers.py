"""LlamaGen's and NAR's VQ tokenizer, LlamaGen's training losses, MAR's KL autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.losses import Losses
from varzoo.nn.lpips import LPIPS
from varzoo.nn.patches import patchify, unpatchify
from varzoo.nn.patchgan import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PatchGAN
from varzoo.tokenizers.kl import KLTokenizer, kl_divergence, split_moments
from varzoo.tokenizers.vq import USAGE_WINDOW, VQTokenizer
from varzoo.training.reconstruction import ReconstructionObjective


def vq_tokenizer(case: Case, image_size: tuple[int, int] | None = None) -> VQTokenizer:
    """The case's tokenizer with its weights; image size from the input images unless given."""
    config = case.config.get("vq", case.config)
    tokenizer = VQTokenizer(
        image_size=tuple(case.inputs["x"].shape[-2:]) if image_size is None else image_size,
        width=case.config.get("ch", 128),
        multipliers=config.get("encoder_ch_mult", [1, 1, 2, 2, 4]),
        decoder_multipliers=config.get("decoder_ch_mult", [1, 1, 2, 2, 4]),
        blocks_per_level=case.config.get("num_res_blocks", 2),
        z_channels=config.get("z_channels", 256),
        codebook_size=config.get("codebook_size", 16384),
        codebook_dim=config.get("codebook_embed_dim", 8),
        l2_norm=config.get("codebook_l2_norm", True),
        commitment=config.get("commit_loss_beta", 0.25),
        entropy_weight=config.get("entropy_loss_ratio", 0.1 if case.kind == "vq_train" else 0.0),
    )
    state = {"quantize.codebook_used": torch.zeros(USAGE_WINDOW)} | case.state_dict
    load_strictly(tokenizer, tokenizer.key_maps()["llamagen"].to_ours(state), "golden case")
    return tokenizer


def vq_encode(case: Case) -> dict[str, Any]:
    tokenizer = vq_tokenizer(case).eval()
    h, w = tokenizer.spec.shape
    with torch.no_grad():
        ids = tokenizer.encode(case.inputs["x"])
        return {"z": tokenizer.latents(case.inputs["x"]), "ids": rearrange(ids, "b (h w) -> b h w", h=h, w=w),
                "quant": tokenizer.lookup(ids)}


def vq_decode(case: Case) -> dict[str, Any]:
    config = case.config.get("vq", case.config)
    factor = 2 ** (len(config.get("decoder_ch_mult", [1, 1, 2, 2, 4])) - 1)
    tokenizer = vq_tokenizer(case, image_size=tuple(side * factor for side in case.inputs["grid"].tolist())).eval()
    with torch.no_grad():
        return {"quant": tokenizer.lookup(case.inputs["ids"]), "image": tokenizer.decode(case.inputs["ids"])}


def vq_train(case: Case) -> dict[str, Any]:
    tokenizer, images = vq_tokenizer(case).train(), case.inputs["x"]
    recon, losses = tokenizer.reconstruction_losses(images, RecordedDraws({}, tuple(range(len(images)))))
    objective = ReconstructionObjective(
        reconstruction="l2", reconstruction_weight=1.0, perceptual=None, perceptual_weight=0.0, discriminator=None,
        adversarial_weight=0.0, adversarial_start=0, discriminator_loss="hinge", generator_loss="hinge", adaptive=False)
    total = objective.generator_losses(images, recon, losses, step=0).total
    total.backward()
    gradients = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    gradients = tokenizer.key_maps()["llamagen"].to_official(gradients)
    return {
        "recon": recon,
        "vq_loss": losses.parts["vq"],
        "commit_loss": losses.parts["commitment"],
        "entropy_loss": losses.parts.get("entropy", torch.zeros(())),
        "codebook_usage": losses.parts["codebook_usage"],
        "total": total,
    } | {f"grad.{name}": gradient for name, gradient in gradients.items()}


def vq_tokenizer_of_nar(case: Case) -> dict[str, Any]:
    tokenizer, images = vq_tokenizer(case).eval(), case.inputs["x"]
    with torch.no_grad():
        ids = tokenizer.encode(images)
        _, losses = tokenizer.reconstruction_losses(images, RecordedDraws({}, tuple(range(len(images)))))
        return {"latent": tokenizer.latents(images), "ids": ids, "quant": tokenizer.lookup(ids),
                "recon": tokenizer.decode(ids), "vq_loss": losses.parts["vq"],
                "commit_loss": losses.parts["commitment"]}


def gan_loss(official: str) -> str:
    return "swapped" if official.startswith("non") else official  # "non-saturating"


def vq_loss(case: Case) -> dict[str, Any]:
    config = case.config
    assert config["disc_type"] == "patchgan", config["disc_type"]
    lpips = LPIPS("vgg")
    state = case.state_dict
    load_strictly(lpips, lpips.key_maps()["llamagen"].to_ours(
        {name: value for name, value in state.items() if name.startswith("perceptual_loss.")}), "golden case")
    discriminator = PatchGAN(width=config["disc_dim"], depth=config["disc_num_layers"]).train()
    given = {name.removeprefix("discriminator."): value for name, value in state.items() if "discriminator." in name}
    load_strictly(discriminator, discriminator.state_dict() | given, "golden case")  # BatchNorm's statistics are fresh
    objective = ReconstructionObjective(
        reconstruction=config.get("reconstruction_loss", "l2"),
        reconstruction_weight=config["reconstruction_weight"],
        perceptual=lpips if config["perceptual_weight"] else None,
        perceptual_weight=config["perceptual_weight"],
        discriminator=discriminator if config["disc_weight"] else None,
        adversarial_weight=config["disc_weight"],
        adversarial_start=config["disc_start"],
        discriminator_loss=gan_loss(config["disc_loss"]),
        generator_loss=gan_loss(config["gen_adv_loss"]),
        adaptive=False,
    )
    step = config.get("global_step", 0)
    images, recon = case.inputs["x"], case.inputs["recon"]
    real, fake = discriminator(images), discriminator(recon)
    bottleneck = Losses(torch.tensor(0.11 + 0.03))
    outputs = {f"{name}_d": DISCRIMINATOR_LOSSES[ours](real, fake) for name, ours in
               (("hinge", "hinge"), ("vanilla", "vanilla"), ("nonsat", "swapped"))}
    outputs |= {f"{name}_g": GENERATOR_LOSSES[ours](fake) for name, ours in (("hinge", "hinge"), ("nonsat", "swapped"))}
    return outputs | {
        "lpips": lpips(images, recon),
        "logits_real": real,
        "logits_fake": fake,
        "gen_total": objective.generator_losses(images, recon, bottleneck, step).total,
        "disc_total": (objective.discriminator_losses(images, recon, step).total if config["disc_weight"]
                       else torch.zeros(())),
    }


def kl_tokenizer(case: Case, image_size: tuple[int, int]) -> KLTokenizer:
    multipliers = case.config["ch_mult"]
    tokenizer = KLTokenizer(
        image_size=image_size,
        width=case.config.get("ch", 128),
        multipliers=multipliers,
        blocks_per_level=2,
        attention_levels=[level for level in range(len(multipliers)) if 256 >> level == 16],
        latent_channels=case.config["embed_dim"],
        patch_size=1,
        scale=0.2325,
        shift=0.0,
        kl_weight=1.0,
        variational=case.config.get("use_variational", True),
    )
    load_strictly(tokenizer, tokenizer.key_maps()["mar"].to_ours(case.state_dict), "golden case")
    return tokenizer.eval()


def vae_encode(case: Case) -> dict[str, Any]:
    images, noise = case.inputs["image"], case.inputs["noise"]
    tokenizer = kl_tokenizer(case, tuple(images.shape[-2:]))
    draws = RecordedDraws({"posterior": Recorded(patchify(noise, 1), "batch")}, tuple(range(len(images))))
    with torch.no_grad():
        moments = tokenizer.moments(images)
        mean, logvar = split_moments(moments, dim=1)
        latent = unpatchify(tokenizer.encode(images, draws), 1, tokenizer.spec.shape)
        return {"enc": tokenizer.encoder(images), "moments": moments, "mean": mean, "logvar": logvar,
                "std": (0.5 * logvar).exp(), "sample": latent / tokenizer.scale, "latent": latent,
                "kl": kl_divergence(mean, logvar)}


def vae_decode(case: Case) -> dict[str, Any]:
    z, latent = case.inputs["z"], case.inputs["latent"]
    factor = 2 ** (len(case.config["ch_mult"]) - 1)
    tokenizer = kl_tokenizer(case, (z.shape[-2] * factor, z.shape[-1] * factor))
    with torch.no_grad():
        return {"image": tokenizer.decode(patchify(z, 1) * tokenizer.scale),
                "image_from_latent": tokenizer.decode(patchify(latent, 1))}


KINDS = {
    "llamagen/vq_encode": vq_encode,
    "llamagen/vq_decode": vq_decode,
    "llamagen/vq_train": vq_train,
    "llamagen/vq_loss": vq_loss,
    "nar/vq_tokenizer": vq_tokenizer_of_nar,
    "mar/vae_encode": vae_encode,
    "mar/vae_decode": vae_decode,
}
