"""FlexTok (arXiv 2502.13967): images as 1-D sequences of tokens, coarse to fine, of which any prefix decodes.

    image --VAE--> latents --RegisterEncoder--> N registers --FSQ--> ids
    ids[:k] --FlowDecoder, from noise--> latents --VAE--> image

The encoder is trained with a random part of its last registers dropped, so that the first carry the most. The decoder
is a rectified flow: what k tokens leave open, it draws. The training code was not published; `reconstruction_losses` is
what the published modules imply (minRF's objective), and docs/flextok.md says what is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.codebook import perplexity
from varzoo.nn.flow import Euler, Velocity
from varzoo.nn.fsq import FSQ
from varzoo.nn.guidance import Guidance
from varzoo.nn.noise_levels import NoiseLevels
from varzoo.nn.repa import REPA
from varzoo.tokenizers.base import UINT8_RULES, Tokenizer
from varzoo.tokenizers.flextok.networks import FlowDecoder, RegisterEncoder
from varzoo.tokenizers.flextok.official import read_tree, rules, settings
from varzoo.tokenizers.prefixes import Prefixes, initial_noise, padded

SOLVER = Euler()


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """The powers of two from low to high, which must be powers of two themselves."""
    powers = tuple(1 << exponent for exponent in range(high.bit_length()) if low <= 1 << exponent)
    if not powers or (powers[0], powers[-1]) != (low, high):
        raise ValueError(f"{low} and {high} must be powers of two, the first not larger; choose kept=uniform or "
                         "another number of registers.")
    return powers


@dataclass(frozen=True)
class NestedDropout:
    """How many of `count` registers training keeps: at least one.

    Args:
        law: "uniform": 1 .. count alike; "powers_of_two": 1, 2, 4, .. count alike; "rounded_up": uniform, then up to
            the next power of two, so that half of all samples keep everything.
        count: number of registers, a power of two unless the law is uniform.
    """

    law: str
    count: int

    LAWS: ClassVar[tuple[str, ...]] = ("uniform", "powers_of_two", "rounded_up")

    def __post_init__(self) -> None:
        if self.law not in self.LAWS:
            raise unknown("law of nested dropout", self.law, self.LAWS)
        if self.law != "uniform":
            powers_of_two(1, self.count)

    @property
    def choices(self) -> tuple[int, ...]:
        """What is kept, one entry per equally likely outcome of the draw."""
        if self.law == "powers_of_two":
            return powers_of_two(1, self.count)
        numbers = range(1, self.count + 1)
        return tuple(numbers) if self.law == "uniform" else tuple(1 << (k - 1).bit_length() for k in numbers)

    def draw(self, draws: AnyDraws) -> Tensor:
        """Registers kept `[B]`, from the stream "kept"."""
        choice = draws.integers("kept", len(self.choices))
        return torch.tensor(self.choices, device=choice.device)[choice]


class FlexTok(Tokenizer):
    """The register tokenizer over a frozen VAE.

    Args:
        vae: any tokenizer of continuous tokens on a grid, which are the latents; never trained here.
        encoder, quantizer, decoder: the parts.
        posterior: train on latents drawn from the VAE's posterior (the published wrapper's default), not on its means.
        kept: law of nested dropout in training, see NestedDropout.
        null_drop: probability with which training replaces all registers by the null condition.
        noise_levels: law of the times that training draws.
        spread: weight of the loss that keeps the registers spread over the batch (ours; published: 0), see spread_loss.
        repa: alignment of the decoder's features with a pretrained network's in training, None for none.
        steps: solver steps of `decode`.
        guidance: of `decode`.
        uint8_rule: how decoded images are rounded.

    Tokens are ids `[B, N]`; `decode` takes any prefix of them.
    """

    goldens: ClassVar[tuple[str, ...]] = ("flextok/*",)
    options = frozenset({"steps", "guidance"})
    needs_objective = False

    def __init__(self, *, vae: Tokenizer, encoder: RegisterEncoder, quantizer: FSQ, decoder: FlowDecoder,
                 posterior: bool, kept: str, null_drop: float, noise_levels: NoiseLevels, spread: float,
                 repa: REPA | None, steps: int, guidance: Guidance, uint8_rule: str = "round") -> None:
        super().__init__()
        if vae.spec.kind != "continuous" or vae.spec.layout != "grid":
            raise ValueError(f"FlexTok works on a grid of continuous latents, but its VAE makes {vae.spec}.")
        patch_size = encoder.patches.patch_size
        if any(side % patch_size for side in vae.spec.shape) or patch_size != decoder.patches.patch_size:
            raise ValueError(f"images of {vae.image_size} give {vae.spec.shape[0]} x {vae.spec.shape[1]} latents, "
                             f"which do not split into patches of {patch_size} x {patch_size}, alike in encoder and "
                             "decoder: choose another image size.")
        counts = {"encoder.registers": len(encoder.registers), "decoder.registers": decoder.count}
        widths = {"quantizer.levels": quantizer.channels, "encoder.out_channels": encoder.head.out_features,
                  "decoder.code_channels": decoder.from_codes.in_features}
        for what in (counts, widths):
            if len(set(what.values())) > 1:
                raise ValueError("FlexTok's parts do not fit: " + ", ".join(f"{k} is {v}" for k, v in what.items()))
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        if not 0 <= null_drop < 1:
            raise ValueError(f"null_drop is a probability below 1, got {null_drop}.")
        self.vae = vae.requires_grad_(False)
        self.encoder, self.quantizer, self.decoder, self.repa = encoder, quantizer, decoder, repa
        self.posterior = posterior
        self.nested_dropout = NestedDropout(kept, decoder.count)
        self.null_drop, self.noise_levels, self.spread = null_drop, noise_levels, spread
        self.steps, self.guidance = steps, guidance
        self.uint8_rule = uint8_rule
        self.image_size = vae.image_size
        self.spec = TokenSpec(kind="discrete", shape=(decoder.count,), size=quantizer.size, prefix_decodes=True)

    @property
    def beneath(self) -> Tokenizer:
        return self.vae

    @classmethod
    def settings_of(cls, path: Path) -> tuple[dict[str, Any], list[str]]:
        tree = read_tree(path)
        if tree is None:
            return {}, ["it carries no configuration, and no config.json lies beside it"]
        return settings(tree)

    def latents(self, images: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> the VAE's scaled latents `[B, C, h, w]`; drawn if draws are given."""
        h, w = self.vae.spec.shape
        with torch.no_grad():
            return rearrange(self.vae.encode(images, draws), "b (h w) c -> b c h w", h=h, w=w)

    def images(self, latents: Tensor) -> Tensor:
        """Scaled latents `[B, C, h, w]` -> images `[B, 3, H, W]`, not clamped."""
        return self.vae.decode(rearrange(latents, "b c h w -> b (h w) c"))

    def ids(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> ids `[B, N]`."""
        return self.quantizer.ids(self.quantizer(self.encoder(latents)))

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> ids `[B, N]` of the VAE's posterior means."""
        return self.ids(self.latents(images))

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids are tokens already, there is nothing to draw."""
        return compressed

    def encode(self, images: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Images -> ids `[B, N]`; with draws, of latents drawn from the VAE's posterior (the published default)."""
        return self.ids(self.latents(images, draws))

    def decode(self, tokens: Prefixes, draws: AnyDraws | None = None, *, lengths: Tensor | Sequence[int] | None = None,
               steps: int | None = None, guidance: Guidance | None = None) -> Tensor:
        """Prefixes of ids -> images `[B, 3, H, W]`, not clamped.

        Args:
            tokens: ids `[B, k]`, or a sequence of B prefixes `[k_i]`, 1 <= k <= N.
            draws: one row per sample, for the noise that the flow begins from.
            lengths: of the prefixes in ids `[B, k]`.
            steps, guidance: instead of the tokenizer's own.
        """
        return self.images(self.decode_latents(tokens, draws, lengths=lengths, steps=steps, guidance=guidance))

    def decode_latents(self, tokens: Prefixes, draws: AnyDraws | None, *, lengths: Tensor | Sequence[int] | None = None,
                       steps: int | None = None, guidance: Guidance | None = None) -> Tensor:
        """Prefixes of ids -> latents `[B, C, h, w]`; see `decode`."""
        steps, guidance = steps or self.steps, guidance or self.guidance
        ids, lengths = padded(tokens, self.spec, lengths)
        noise = initial_noise(draws, len(ids), (self.vae.spec.size, *self.vae.spec.shape))
        known = self.decoder.registers(self.quantizer.codes(ids), lengths)
        nothing, guide = self.decoder.null(len(ids)), guidance.begin()

        def velocity_at(times: Tensor) -> Velocity:
            def velocity(x: Tensor, k: int) -> Tensor:
                time, x = float(times[k]), x.to(noise.dtype)
                at = x.new_full((len(x),), time)
                conditional, _ = self.decoder(x, at, known)
                if not guidance.needs_null:
                    return conditional
                return guide(conditional, self.decoder(x, at, nothing)[0], time)
            return velocity

        return SOLVER.solve(velocity_at, noise, _no_noise, steps=steps).sample.to(noise.dtype)

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[None, Losses]:
        """The flow's loss, those of spread and REPA where they have a weight; nothing is decoded.

        Draws: the VAE's posterior, "kept" (nested dropout), "null" (condition dropped), "noise_level" and "noise", and
        what the quantizer perturbs.
        """
        latents = self.latents(images, draws if self.posterior else None)
        noise = draws.normal("noise", tuple(latents.shape[1:]), dtype=latents.dtype)
        unquantized = self.encoder(latents)
        codes = self.quantizer.perturbed(unquantized, draws)
        velocity, features = self.flow(
            latents, noise, self.noise_levels.draw(draws), codes, self.nested_dropout.draw(draws),
            draws.uniform("null") < self.null_drop)
        parts = {"flow": flow_loss(velocity, latents, noise).mean()}
        if self.spread:
            parts["spread"] = self.spread * spread_loss(unquantized)
        if self.repa is not None:
            patches = [side // self.decoder.patches.patch_size for side in latents.shape[-2:]]
            parts["repa"] = self.repa.weight * self.repa(features, tuple(patches), images)
        statistics = {"perplexity": perplexity(self.quantizer.ids(codes.detach()), self.spec.size)}
        return None, Losses(sum(parts.values(), torch.zeros((), device=latents.device)),
                            {name: part.detach() for name, part in (parts | statistics).items()})

    def flow(self, latents: Tensor, noise: Tensor, times: Tensor, codes: Tensor, kept: Tensor,
             dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The velocity `[B, C, h, w]` at times `[B]` between latents (0) and noise (1), and the features for REPA.

        Args:
            codes: `[B, N, code_channels]`, of which each sample keeps the first `kept` `[B]`; where `dropped` `[B]`,
                none.
        """
        noised = torch.lerp(latents, noise, times[:, None, None, None].to(latents.dtype))
        registers = self.decoder.registers(codes, kept, dropped)
        return self.decoder(noised, times, registers, features_after=self.repa.layer if self.repa else None)

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "flextok", that of the hub's files."""
        return {"flextok": KeyMap([*rules(self.encoder, self.decoder)])}


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each sample's velocity `[B]`, in float32 (minRF's objective)."""
    return (velocity.float() - (noise - latents).float()).square().flatten(1).mean(dim=1)


def spread_loss(unquantized: Tensor) -> Tensor:
    """How far each register channel is from mean 0 and variance 1 over a batch `[B, N, C]`: a mean KL divergence.

    Without it a short training drifts into the ends of the quantiser's range before the decoder reads any register, and
    stays there: all images then have the same tokens.
    """
    unquantized = unquantized.float()
    mean, variance = unquantized.mean(dim=0), unquantized.var(dim=0, unbiased=False) + 1e-4
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


def _no_noise(k: int) -> Tensor:
    raise AssertionError("Euler's method adds no noise")
