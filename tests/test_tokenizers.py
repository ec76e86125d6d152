from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.tokenizers import kl_tokenizer, vq_tokenizer
from tests.golden_case import load_case
from varzoo.core.draws import Draws
from varzoo.nn.codebook import entropy_loss, perplexity
from varzoo.nn.conv_autoencoder import build_encoder
from varzoo.nn.patches import patchify, unpatchify
from varzoo.tokenizers.base import Tokenizer
from varzoo.tokenizers.kl import KLTokenizer, LatentStatistics, kl_divergence, latent_statistics, split_moments
from varzoo.tokenizers.vq import USAGE_WINDOW, VQTokenizer

GOLDENS = Path(__file__).parent / "goldens"


def small_vq(image_size=16, **options) -> VQTokenizer:
    """The default demo's shape: f2, width 32."""
    config = {"width": 32, "multipliers": [1, 2], "blocks_per_level": 1, "z_channels": 32, "codebook_size": 24,
              "codebook_dim": 8, "l2_norm": True, "commitment": 0.25, "entropy_weight": 0.0}
    return VQTokenizer(image_size=image_size, **(config | options))


def small_kl(image_size=16, **options) -> KLTokenizer:
    config = {"width": 32, "multipliers": [1, 2], "blocks_per_level": 1, "attention_levels": [1], "latent_channels": 4,
              "patch_size": 1, "scale": 0.5, "shift": 0.25, "kl_weight": 1e-6}
    return KLTokenizer(image_size=image_size, **(config | options))


SMALL = {"vq": small_vq, "kl": small_kl, "kl_patch2": lambda size=16: small_kl(size, patch_size=2)}


@pytest.fixture(params=SMALL)
def tokenizer_of_size(request):
    return SMALL[request.param]


def images_of(batch: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


# Official layouts and sizes


@pytest.mark.parametrize(("case", "build", "layout"), [
    ("llamagen/vq_train", vq_tokenizer, "llamagen"),
    ("mar/vae_encode", lambda case: kl_tokenizer(case, (64, 48)), "mar"),
])
def test_official_state_dict_survives_the_round_trip(case: str, build, layout: str) -> None:
    case = load_case(GOLDENS / case)
    official = {"quantize.codebook_used": torch.arange(USAGE_WINDOW).float()} if layout == "llamagen" else {}
    official |= case.state_dict
    key_map = build(case).key_maps()[layout]
    back = key_map.to_official(key_map.to_ours(official))
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name


def test_a_wrapped_or_foreign_official_file_is_read_or_refused() -> None:
    official = load_case(GOLDENS / "mar/vae_encode").state_dict
    key_map = small_kl(multipliers=[1, 1, 1, 1, 2], attention_levels=[4]).key_maps()["mar"]
    with_loss = official | {"loss.logvar": torch.zeros(())}
    assert key_map.to_ours(with_loss).keys() == key_map.to_ours(official).keys()
    with pytest.raises(ValueError, match=r"quantize\.embedding\.weight"):
        key_map.to_ours(official | {"quantize.embedding.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(("multipliers", "millions", "grid"), [
    ([1, 1, 2, 2, 4], 71.88, (16, 16)),
    ([1, 2, 2, 4], 70.11, (32, 32)),
])
def test_published_vq_sizes(multipliers: list[int], millions: float, grid: tuple[int, int]) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(image_size=256, width=128, multipliers=multipliers, blocks_per_level=2, z_channels=256,
                                codebook_size=16384, codebook_dim=8, l2_norm=True, commitment=0.25, entropy_weight=0.0)
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert tokenizer.spec.shape == grid


def test_published_kl_size() -> None:
    with torch.device("meta"):
        tokenizer = KLTokenizer(image_size=256, width=128, multipliers=[1, 1, 2, 2, 4], blocks_per_level=2,
                                attention_levels=[4], latent_channels=16, patch_size=1, scale=0.2325, shift=0.0,
                                kl_weight=1e-6)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert count(tokenizer) == pytest.approx(66.46, abs=0.005)
    assert count(tokenizer.encoder) == pytest.approx(28.27, abs=0.01)
    assert count(tokenizer.decoder) == pytest.approx(38.19, abs=0.01)
    assert (tokenizer.spec.shape, tokenizer.spec.size) == ((16, 16), 16)


# What every tokenizer does


def test_rows_are_independent_and_deterministic(tokenizer_of_size) -> None:
    tokenizer, images = tokenizer_of_size().eval(), images_of(3)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, tokenizer.encode(images))
    torch.testing.assert_close(tokenizer.encode(images[1:2]), tokens[1:2])
    torch.testing.assert_close(tokenizer.decode(tokens[1:2]), tokenizer.decode(tokens)[1:2])


def test_training_and_evaluation_mode_compute_the_same(tokenizer_of_size) -> None:
    tokenizer, images = tokenizer_of_size(), images_of(2)
    assert torch.equal(tokenizer.train().encode(images), tokenizer.eval().encode(images))


def test_images_need_not_be_square(tokenizer_of_size) -> None:
    tokenizer = tokenizer_of_size([24, 16])
    tokens = tokenizer.encode(images_of(2, 24, 16))
    assert tokens.shape[:2] == (2, tokenizer.spec.length)
    assert tokenizer.spec.shape[0] * 16 == tokenizer.spec.shape[1] * 24
    assert tokenizer.decode(tokens).shape == (2, 3, 24, 16)


@pytest.mark.parametrize("size", [17, [16, 15], [16], 0, [16, 16, 16]])
def test_image_size_must_be_divisible(tokenizer_of_size, size) -> None:
    with pytest.raises(ValueError, match="multiples of the tokenizer's downsampling factor"):
        tokenizer_of_size(size)


@pytest.mark.parametrize("shape", [(1, 3, 16, 32), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_size_are_refused(tokenizer_of_size, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes images"):
        tokenizer_of_size().encode(torch.zeros(shape))


def test_one_training_step_improves_the_reconstruction(tokenizer_of_size) -> None:
    tokenizer, images = tokenizer_of_size().train(), images_of(4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)

    def loss() -> torch.Tensor:
        reconstructions, bottleneck = tokenizer.reconstruction_losses(images, Draws(0, range(4)))
        return (reconstructions - images).square().mean() + bottleneck.total

    before = loss()
    before.backward()
    untrained = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all logits of a query alike, so softmax leaves it no gradient but rounding.
    assert all(name.endswith("to_k.bias") for name in untrained)
    optimizer.step()
    assert loss() < before


def test_last_decoder_weight_ends_in_pixels(tokenizer_of_size) -> None:
    tokenizer: Tokenizer = tokenizer_of_size()
    assert tokenizer.last_decoder_weight().shape[0] == 3


@pytest.mark.parametrize("build", [small_vq, small_kl])
def test_bad_configs_are_refused(build) -> None:
    with pytest.raises(ValueError, match="multiple of the 32 norm groups"):
        build(width=48)
    with pytest.raises(ValueError, match="uint8 rule"):
        build(uint8_rule="rounded")
    with pytest.raises(ValueError, match="attention_levels"):
        build_encoder(width=32, multipliers=[1, 2], blocks_per_level=1, attention_levels=[2], out_channels=4)


# VQ


def test_codes_decode_to_themselves() -> None:
    tokenizer = small_vq().eval()
    codes = tokenizer.codebook()
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(24))
    assert torch.equal(tokenizer._nearest(tokenizer._comparable(3 * codes)[None]), torch.arange(24)[None])


def test_ids_are_in_raster_order() -> None:
    tokenizer = small_vq([32, 16]).eval()
    images = images_of(1, 32, 16)
    latents, ids = tokenizer.latents(images), tokenizer.encode(images)
    for row, column in ((0, 7), (3, 2), (15, 0)):
        latent = tokenizer._comparable(latents[:, :, row, column])
        nearest = (tokenizer.codebook() - latent).norm(dim=-1).argmin()
        assert ids[0, row * 8 + column] == nearest
        assert torch.equal(tokenizer.lookup(ids)[0, :, row, column], tokenizer.codebook()[nearest])


def test_without_l2_norm_length_counts() -> None:
    tokenizer = small_vq(l2_norm=False)
    with torch.no_grad():
        tokenizer.embedding.weight[:2] = torch.tensor([1.0, 3.0])[:, None]
        tokenizer.embedding.weight[2:] = 99
    latents = torch.tensor([1.9, 2.1])[None, :, None].expand(1, 2, 8)
    assert tokenizer._nearest(tokenizer._comparable(latents)).tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [-1, 24, 10**6])
def test_ids_outside_the_codebook_are_refused(bad: int) -> None:
    tokenizer = small_vq()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    ids[1, 5] = bad
    with pytest.raises(ValueError, match="0 to 23, the codebook"):
        tokenizer.decode(ids)


def test_ids_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ids \[B, 64\]"):
        small_vq().decode(torch.zeros(1, 16, dtype=torch.int64))


def test_decoders_of_another_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many levels"):
        small_vq(decoder_multipliers=[1, 1, 2])
    assert small_vq(decoder_multipliers=[2, 1]).decode(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 3, 16, 16)


def test_usage_counts_recent_training_ids_only() -> None:
    tokenizer = small_vq()
    ids = torch.full((2, 64), 5)
    assert tokenizer.eval()._usage(ids) == pytest.approx(2 / 24)  # id 0 fills the window at first
    assert not tokenizer.recent_ids.any()
    assert tokenizer.train()._usage(ids) == pytest.approx(2 / 24)
    assert (tokenizer.recent_ids == 5).sum() == 128 and (tokenizer.recent_ids[-128:] == 5).all()
    assert tokenizer._usage(torch.full((2, USAGE_WINDOW), 7)) == pytest.approx(1 / 24)
    assert tokenizer.recent_ids.shape == (USAGE_WINDOW,)


def test_perplexity() -> None:
    assert perplexity(torch.zeros(2, 9, dtype=torch.int64), 24) == pytest.approx(1)
    assert perplexity(torch.arange(24).repeat(3, 2), 24) == pytest.approx(24)


def test_entropy_loss_prefers_confident_and_diverse_codes() -> None:
    confident = torch.eye(4)[None]
    assert entropy_loss(confident) == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-3)
    assert entropy_loss(confident[:, :1].expand(1, 4, 4)) == pytest.approx(0, abs=1e-3)
    assert entropy_loss(torch.zeros(1, 4, 4)) == pytest.approx(0, abs=1e-3)


def test_gradients_pass_straight_through() -> None:
    tokenizer, images = small_vq(commitment=0.0), images_of(1)
    reconstructions, _ = tokenizer.reconstruction_losses(images, Draws(0, [0]))
    torch.testing.assert_close(reconstructions, tokenizer.decode(tokenizer.encode(images)))
    reconstructions.sum().backward()
    assert tokenizer.encoder.conv_in.weight.grad.any()
    assert tokenizer.embedding.weight.grad is None or not tokenizer.embedding.weight.grad.any()


# KL


def test_patches_are_channel_row_column() -> None:
    maps = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(maps, 2)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 4].tolist() == [maps[0, c, 2 + i, 2 + j] for c in (0, 1) for i in (0, 1) for j in (0, 1)]
    assert torch.equal(unpatchify(tokens, 2, (2, 3)), maps)
    with pytest.raises(ValueError, match="4 x 6 map"):
        patchify(maps, 4)
    with pytest.raises(ValueError, match="6 tokens"):
        unpatchify(tokens, 2, (3, 3))


def test_cached_moments_give_the_same_tokens_and_draws_differ_by_sample() -> None:
    tokenizer, images = small_kl(patch_size=2).eval(), images_of(1).expand(3, -1, -1, -1)
    moments, draws = tokenizer.compress(images), Draws(1, [7, 8, 7])
    assert moments.shape == (3, 16, 2 * tokenizer.spec.size)
    samples = tokenizer.tokens(moments, draws)
    assert torch.equal(samples, tokenizer.encode(images, draws))
    torch.testing.assert_close(samples[0], samples[2])
    assert (samples[0] - samples[1]).abs().mean() > 0.1
    torch.testing.assert_close(tokenizer.tokens(moments[1:2], draws.rows([1])), samples[1:2])


def test_patches_hold_the_same_latents() -> None:
    plain, patched = small_kl([16, 24]).eval(), small_kl([16, 24], patch_size=2).eval()
    patched.load_state_dict(plain.state_dict())
    images = images_of(2, 16, 24)
    tokens = patched.encode(images)
    torch.testing.assert_close(unpatchify(tokens, 2, (4, 6)), unpatchify(plain.encode(images), 1, (8, 12)))
    torch.testing.assert_close(patched.decode(tokens), plain.decode(plain.encode(images)))


def test_decoding_undoes_scale_and_shift() -> None:
    one, other = small_kl(scale=1.0, shift=0.0).eval(), small_kl(scale=0.3, shift=-2.0).eval()
    other.load_state_dict(one.state_dict())
    images = images_of(2)
    torch.testing.assert_close(other.encode(images), 0.3 * (one.encode(images) + 2))
    torch.testing.assert_close(other.decode(other.encode(images)), one.decode(one.encode(images)))


def test_samples_follow_the_posterior() -> None:
    tokenizer = small_kl()
    moments = torch.tensor([3.0] * 4 + [-1.0] * 4).expand(2000, 1, 8)
    tokens = tokenizer.tokens(moments, Draws(0, range(2000)))
    assert tokens.mean().item() == pytest.approx(0.5 * (3.0 - 0.25), abs=0.02)
    assert tokens.std().item() == pytest.approx(0.5 * torch.tensor(-0.5).exp().item(), abs=0.02)
    torch.testing.assert_close(tokenizer.tokens(moments)[0], torch.full((1, 4), 0.5 * 2.75))


def test_extreme_log_variances_are_clamped() -> None:
    _, logvar = split_moments(torch.tensor([[0.0, 0.0, -1e4, 1e4]]), dim=-1)
    assert logvar.tolist() == [[-30, 20]]


def test_kl_divergence_is_zero_for_the_prior_only() -> None:
    assert torch.equal(kl_divergence(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)), torch.zeros(2))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(1.5, 0.7), torch.distributions.Normal(0, 1))
    mean, logvar = torch.full((2, 5), 1.5), torch.full((2, 5), 0.49).log()
    torch.testing.assert_close(kl_divergence(mean, logvar), 5 * expected.expand(2))


def test_not_variational_keeps_log_variance_one() -> None:
    tokenizer = small_kl(variational=False)
    mean, logvar = split_moments(tokenizer.moments(images_of(2)), dim=1)
    assert mean.shape == logvar.shape == (2, 4, 8, 8) and (logvar == 1).all()


def test_tokens_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected tokens \[B, 64, 4\]"):
        small_kl().decode(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="scale"):
        small_kl(scale=0.0)


def test_latent_statistics_choose_the_scale() -> None:
    tokenizer = small_kl(scale=1.0, shift=0.0).eval()
    with torch.no_grad():  # channel 2 collapses: its mean ignores the image
        tokenizer.quant_conv.weight[2], tokenizer.quant_conv.bias[2] = 0, 0.7
    batches = [images_of(4), images_of(2)]
    statistics: LatentStatistics = latent_statistics(tokenizer, batches)
    images = torch.cat(batches)
    means = tokenizer.tokens(tokenizer.compress(images)).flatten(0, 1)
    torch.testing.assert_close(statistics.channel_mean, means.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(statistics.channel_spread, means.std(0, correction=0), atol=1e-4, rtol=1e-3)
    assert statistics.channel_spread[2] < 1e-3 < statistics.channel_spread[0]

    tokenizer.scale, tokenizer.shift = statistics.scale, statistics.mean
    samples = torch.stack([tokenizer.encode(images, Draws(seed, range(6))) for seed in range(20)])
    assert samples.std().item() == pytest.approx(1, abs=0.02)
    assert samples.mean().item() == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="no images"):
        latent_statistics(tokenizer, [])
