from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from varzoo.core.losses import Losses
from varzoo.nn.lpips import LPIPS
from varzoo.nn.patchgan import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PatchGAN
from varzoo.training.reconstruction import ReconstructionObjective


def objective(**options) -> ReconstructionObjective:
    config = {"reconstruction": "l2", "reconstruction_weight": 1.0, "perceptual": None, "perceptual_weight": 0.0,
              "discriminator": None, "adversarial_weight": 0.0, "adversarial_start": 0, "discriminator_loss": "hinge",
              "generator_loss": "hinge", "adaptive": False}
    return ReconstructionObjective(**(config | options))


def adversarial(**options) -> ReconstructionObjective:
    return objective(**({"discriminator": PatchGAN(width=8, depth=2), "adversarial_weight": 0.5} | options))


def pair(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(4, 3, size, size) * 2 - 1
    return images, images + 0.3 * torch.randn_like(images)


BOTTLENECK = Losses(torch.tensor(0.25), {"kl": torch.tensor(3.0)})


@pytest.mark.parametrize(("name", "expected"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_reconstruction_and_bottleneck_alone(name: str, expected) -> None:
    images, reconstructions = pair()
    losses = objective(reconstruction=name, reconstruction_weight=2.0).generator_losses(
        images, reconstructions, BOTTLENECK, step=0)
    torch.testing.assert_close(losses.total, 2 * expected(reconstructions, images) + 0.25)
    assert losses.parts.keys() == {"reconstruction", "kl"}


def test_perceptual_term() -> None:
    images, reconstructions = pair()
    lpips = LPIPS("vgg")
    losses = objective(perceptual=lpips, perceptual_weight=0.7).generator_losses(images, reconstructions, BOTTLENECK, 0)
    expected = F.mse_loss(reconstructions, images) + 0.7 * lpips(images, reconstructions).mean() + 0.25
    torch.testing.assert_close(losses.total, expected)


def test_adversary_counts_from_its_start_on() -> None:
    (images, reconstructions), model = pair(), adversarial(adversarial_start=10)
    before = model.generator_losses(images, reconstructions, BOTTLENECK, step=9)
    after = model.generator_losses(images, reconstructions, BOTTLENECK, step=10)
    assert "adversarial" not in before.parts
    torch.testing.assert_close(after.total, before.total + 0.5 * after.parts["adversarial"])

    waiting = model.discriminator_losses(images, reconstructions, step=9)
    waiting.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.discriminator.parameters())
    model.discriminator_losses(images, reconstructions, step=10).total.backward()
    assert all(p.grad.any() for p in model.discriminator.parameters() if p.ndim == 4)


def test_discriminator_side_leaves_the_tokenizer_alone() -> None:
    images, reconstructions = pair()
    reconstructions.requires_grad_()
    adversarial().discriminator_losses(images, reconstructions, step=0).total.backward()
    assert reconstructions.grad is None


def test_discriminator_learns_to_tell_real_from_fake() -> None:
    images, _ = pair()
    fakes, model = images.roll(1, dims=1).flip(-1) * 0.2, adversarial()
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-3)
    for _ in range(30):
        losses = model.discriminator_losses(images, fakes, step=0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.parts["logits_real"] > losses.parts["logits_fake"] + 0.5


def test_adaptive_weight_balances_gradients_at_the_last_layer() -> None:
    images, _ = pair()
    last, model = nn.Conv2d(3, 3, 3, padding=1), adversarial(adaptive=True, reconstruction_weight=3.0)
    losses = model.generator_losses(images, last(images), BOTTLENECK, step=0, last_weight=last.weight)
    closeness = torch.autograd.grad(3 * F.mse_loss(last(images), images), last.weight)[0].norm()
    opposing = torch.autograd.grad(-model.discriminator(last(images)).mean(), last.weight)[0].norm()
    torch.testing.assert_close(losses.parts["adversarial_weight"], 0.5 * closeness / (opposing + 1e-4))
    losses.total.backward()
    assert last.weight.grad.any()


def test_adaptive_weight_is_bounded() -> None:
    images, _ = pair()
    last, model = nn.Conv2d(3, 3, 1), adversarial(adaptive=True, reconstruction_weight=1e9)
    losses = model.generator_losses(images, last(images), BOTTLENECK, step=0, last_weight=last.weight)
    assert losses.parts["adversarial_weight"] == 0.5 * 1e4


def test_logged_parts_hold_no_graph() -> None:
    images, reconstructions = pair()
    model = adversarial()
    parts = model.generator_losses(images, reconstructions.requires_grad_(), BOTTLENECK, step=0).parts
    parts |= model.discriminator_losses(images, reconstructions, step=0).parts
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_adversarial_losses_pull_logits_the_right_way(name: str) -> None:
    real, fake = torch.zeros(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    DISCRIMINATOR_LOSSES[name](real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    GENERATOR_LOSSES[name](fake).backward()
    assert (fake.grad < 0).all()


def test_swapped_losses_are_the_official_fault() -> None:
    """Arguments of binary cross-entropy swapped: the discriminator gets nothing from fakes."""
    real, fake = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    DISCRIMINATOR_LOSSES["swapped"](real, fake).backward()
    assert (real.grad < 0).all() and not fake.grad.any()


def test_official_discriminator_size() -> None:
    """VQGAN's with 64 channels and 3 layers: 2.77 M parameters, logits of overlapping 70-pixel patches."""
    model = PatchGAN(width=64, depth=3)
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    assert model(torch.zeros(2, 3, 256, 128)).shape == (2, 1, 30, 14)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_smallest_images(depth: int) -> None:
    model = PatchGAN(width=4, depth=depth)
    assert model(torch.zeros(2, 3, model.smallest, model.smallest)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="smaller depth"):
        model(torch.zeros(2, 3, model.smallest - 1, model.smallest))


@pytest.mark.parametrize(("options", "message"), [
    ({"reconstruction": "mse"}, "unknown reconstruction loss 'mse'"),
    ({"discriminator_loss": "hing"}, "Did you mean 'hinge'"),
    ({"generator_loss": "wasserstein"}, "unknown generator loss"),
    ({"perceptual_weight": 1.0}, "perceptual is absent"),
    ({"adversarial_weight": 0.5}, "discriminator is absent"),
    ({"discriminator": nn.Identity()}, "discriminator is given but its weight is 0"),
])
def test_contradictory_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_what_is_missing_at_a_step_is_named() -> None:
    images, reconstructions = pair()
    with pytest.raises(ValueError, match="no discriminator"):
        objective().discriminator_losses(images, reconstructions, step=0)
    with pytest.raises(ValueError, match="last_decoder_weight"):
        adversarial(adaptive=True).generator_losses(images, reconstructions, BOTTLENECK, step=0)
