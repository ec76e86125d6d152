"""What compares reconstruction and original when a tokenizer is trained: L1 or L2, LPIPS, and an adversary.

VQGAN's objective (arXiv 2012.09841, section 3.1) as LlamaGen uses it (arXiv 2406.06525): there L2, LPIPS on VGG with
weight 1, and a PatchGAN hinge loss of constant weight 0.5 from step 20000 on. VQGAN balances the adversary by gradient
norms instead (`adaptive`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varzoo.core.errors import unknown
from varzoo.core.losses import Losses
from varzoo.nn.lpips import LPIPS
from varzoo.nn.patchgan import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class ReconstructionObjective(nn.Module):
    """The losses of the tokenizer ("generator") and of its adversary, for two optimisers that take turns.

    Args:
        reconstruction: "l1" or "l2", averaged over pixels.
        reconstruction_weight: its weight. Latent diffusion sums over pixels instead: there it is 3 H W.
        perceptual: LPIPS, or None. Frozen.
        perceptual_weight: its weight; 0 if and only if `perceptual` is None.
        discriminator: images `[B, 3, H, W]` -> logits; None trains without an adversary.
        adversarial_weight: weight of the adversarial term, on both sides; 0 if and only if `discriminator` is None.
        adversarial_start: step from which the adversarial terms count, on both sides: before it, the discriminator
            learns nothing either.
        discriminator_loss: a key of `DISCRIMINATOR_LOSSES`.
        generator_loss: a key of `GENERATOR_LOSSES`.
        adaptive: multiply `adversarial_weight` by the ratio of the gradient norms of the other terms and of the
            adversarial one at the last decoder layer (arXiv 2012.09841, eq. 7), on the tokenizer's side.
    """

    def __init__(self, *, reconstruction: str, reconstruction_weight: float, perceptual: LPIPS | None,
                 perceptual_weight: float, discriminator: nn.Module | None, adversarial_weight: float,
                 adversarial_start: int, discriminator_loss: str, generator_loss: str, adaptive: bool) -> None:
        super().__init__()
        for what, name, table in (("reconstruction loss", reconstruction, RECONSTRUCTION_LOSSES),
                                  ("discriminator loss", discriminator_loss, DISCRIMINATOR_LOSSES),
                                  ("generator loss", generator_loss, GENERATOR_LOSSES)):
            if name not in table:
                raise unknown(what, name, table)
        for module, given, weight in (("perceptual", perceptual, perceptual_weight),
                                      ("discriminator", discriminator, adversarial_weight)):
            if (given is None) != (weight == 0):
                raise ValueError(f"{module} is {'absent' if given is None else 'given'} but its weight is {weight:g}; "
                                 f"give a {module} module with a positive weight, or None with weight 0.")
        self.reconstruct = RECONSTRUCTION_LOSSES[reconstruction]
        self.reconstruction_weight = reconstruction_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.discriminate = DISCRIMINATOR_LOSSES[discriminator_loss]
        self.fool = GENERATOR_LOSSES[generator_loss]
        self.adaptive = adaptive

    def generator_losses(self, images: Tensor, reconstructions: Tensor, bottleneck: Losses, step: int,
                         last_weight: Tensor | None = None) -> Losses:
        """The tokenizer's side.

        Args:
            images: originals `[B, 3, H, W]` in [-1, 1].
            reconstructions: the tokenizer's, with their graph.
            bottleneck: what the tokenizer's `reconstruction_losses` gave along with them; its parts are passed on.
            step: number of training steps done.
            last_weight: `tokenizer.last_decoder_weight()`, needed where `adaptive`.
        """
        pixels = self.reconstruct(reconstructions, images)
        closeness = self.reconstruction_weight * pixels
        parts = {"reconstruction": pixels}
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, reconstructions).mean()
            closeness = closeness + self.perceptual_weight * parts["perceptual"]
        total = closeness + bottleneck.total
        if self.discriminator is not None and step >= self.adversarial_start:
            parts["adversarial"] = self.fool(self.discriminator(reconstructions))
            weight = pixels.new_tensor(self.adversarial_weight)
            if self.adaptive:
                weight = weight * self._balance(closeness, parts["adversarial"], last_weight)
            parts["adversarial_weight"] = weight
            total = total + weight * parts["adversarial"]
        parts = {name: part.detach() for name, part in parts.items()}
        return Losses(total, parts | bottleneck.parts)

    def discriminator_losses(self, images: Tensor, reconstructions: Tensor, step: int) -> Losses:
        """The adversary's side; the reconstructions are detached here.

        Before `adversarial_start` the total is multiplied by 0, not left out, so that its gradients exist (and are 0)
        and the optimiser counts those steps, as officially.
        """
        if self.discriminator is None:
            raise ValueError("this objective has no discriminator to train; give one, or skip its turn.")
        real = self.discriminator(images)
        fake = self.discriminator(reconstructions.detach())
        loss = self.discriminate(real, fake)
        weight = self.adversarial_weight if step >= self.adversarial_start else 0.0
        parts = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return Losses(weight * loss, {name: part.detach() for name, part in parts.items()})

    @staticmethod
    def _balance(closeness: Tensor, adversarial: Tensor, last_weight: Tensor | None) -> Tensor:
        if last_weight is None:
            raise ValueError("adaptive needs last_weight, the tokenizer's last_decoder_weight().")
        gradients = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0] for loss in (closeness, adversarial)]
        return (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0, 1e4).detach()
