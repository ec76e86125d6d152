"""Distances and scores equal numpy's and torch-fidelity's, and do not depend on batches, order or processes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.metric_kid import kid_features_to_metric

from tests.images import smooth_images, toy_images
from varzoo.data import Digits
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import ClassifierFeatures, FeatureExtractor, full_precision
from varzoo.eval.inception import WEIGHTS, InceptionFeatures
from varzoo.eval.inception_score import InceptionScore, consecutive_splits, equal_splits, shuffled_splits
from varzoo.eval.kernel_distance import kernel_distance, polynomial_mmd, subset_indices
from varzoo.eval.manifold import neighbour_radii, precision_recall
from varzoo.eval.moments import Gaussian, Moments, frechet_distance
from varzoo.eval.pretrained import MobileNetFeatures
from varzoo.eval.reconstruction import CodebookUsage, PairScores
from varzoo.eval.references import Reference
from varzoo.eval.score import Samples, Scorer, dataset_samples, make_protocol, reference_statistics, score
from varzoo.eval.similarity import psnr, ssim


class Toy(FeatureExtractor):
    """Five linear features of 4 x 4 images, three classes."""

    name, metric, dim, classes = "toy", "fd_toy", 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 48, generator=torch.Generator().manual_seed(0)) / 400)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        output = (images.flatten(1).float() - 128) @ self.weight.T
        return {"features": output[:, :5], "logits": 4 * output[:, 5:]}


def gaussian(features: Tensor) -> Gaussian:
    moments = Moments(dim=features.shape[1])
    moments.update(features)
    return moments.gaussian()


# --- moments and Fréchet distance ---

def test_moments_equal_numpy_and_do_not_depend_on_batches() -> None:
    features = torch.randn(101, 7, dtype=torch.float64) + 100
    moments = Moments(dim=7)
    for rows in features.split(13):
        moments.update(rows)
    result = moments.gaussian()
    np.testing.assert_allclose(result.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_merged_shards_equal_the_whole() -> None:
    features = torch.randn(60, 5)
    whole, shards = gaussian(features), [Moments(dim=5, count=60) for _ in range(3)]
    for rank, shard in enumerate(shards):
        indices = torch.arange(rank, 66, 3)  # padded beyond the set, as samplers do
        shard.update(features[indices % 60], indices)
        shard.update(features[indices % 60], indices)  # and counted again
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert len(shards[0]) == 60
    torch.testing.assert_close(shards[0].gaussian().covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="counted by two"):
        shards[0].merge(shards[1])


def test_a_repeated_index_counts_once() -> None:
    moments, features = Moments(dim=2), torch.tensor([[1.0, 2], [3, 5], [1, 2]])
    moments.update(features, torch.tensor([4, 1, 4]))
    assert len(moments) == 2
    assert moments.gaussian().mean.tolist() == [2.0, 3.5]


def test_moments_resume_from_their_state() -> None:
    features, moments, resumed = torch.randn(40, 3), Moments(dim=3, count=40), Moments(dim=3, count=40)
    moments.update(features[:25])
    resumed.load_state_dict(moments.state_dict())
    resumed.update(features[25:])
    torch.testing.assert_close(resumed.gaussian().covariance, gaussian(features).covariance)


def test_broken_features_are_refused() -> None:
    moments = Moments(dim=3)
    with pytest.raises(ValueError, match="not finite"):
        moments.update(torch.tensor([[1.0, float("nan"), 0]]))
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least two"):
        moments.gaussian()
    with pytest.raises(ValueError, match="two different extractors"):
        frechet_distance(gaussian(torch.randn(9, 3)), gaussian(torch.randn(9, 4)))


def test_distance_of_a_set_with_itself_is_zero() -> None:
    for rows in (200, 5):  # full rank, rank-deficient
        own = gaussian(torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)))
        assert 0 <= frechet_distance(own, own) < 1e-6


def test_distance_equals_the_matrix_root_formula() -> None:
    a, b = gaussian(torch.randn(300, 12)), gaussian(torch.randn(200, 12) * 1.3 + 0.4)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_distance_of_shifted_gaussians_is_known() -> None:
    features = torch.randn(50, 4, dtype=torch.float64)
    assert frechet_distance(gaussian(features), gaussian(features + 3)) == pytest.approx(4 * 9, rel=1e-9)


# --- other distances ---

def test_kernel_distance_is_unbiased() -> None:
    x, y = torch.randn(200, 6), torch.randn(200, 6)
    estimates = [polynomial_mmd(x[rows], y[rows]) for rows in torch.arange(200).split(20)]
    assert abs(np.mean(estimates)) < 2 * np.std(estimates)  # a biased estimate would be positive throughout
    assert min(estimates) < 0 < polynomial_mmd(x, y + 1)
    with pytest.raises(ValueError, match="subsets of 30 need as many"):
        subset_indices(20, 50, subsets=2, size=30)
    indices = subset_indices(200, 150, subsets=4, size=50)
    assert kernel_distance(x, x, indices)[0] == kernel_distance(x.flip(1), x.flip(1), indices)[0]


def test_precision_and_recall_of_known_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    line = torch.arange(20.0)[:, None]
    assert neighbour_radii(line, k=3)[[0, 10]].tolist() == [9.0, 4.0]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line[:10], line) == (1.0, 0.65)  # within 3 of 9
    assert precision_recall(line + 100, line) == (0.0, 0.0)
    points, others = torch.randn(50, 4), torch.randn(40, 4)
    whole = precision_recall(points, others)
    monkeypatch.setattr("varzoo.eval.manifold.TILE", 7)
    assert precision_recall(points, others) == whole
    with pytest.raises(ValueError, match="more than 3 points"):
        neighbour_radii(points[:3])


def test_biased_covariance_is_larps() -> None:
    features, moments = torch.randn(9, 3, dtype=torch.float64), Moments(dim=3)
    moments.update(features)
    np.testing.assert_allclose(moments.gaussian(biased=True).covariance, np.cov(features.T, bias=True), atol=1e-12)


def test_feature_bank_on_disk_is_taken_up(tmp_path: Path) -> None:
    features = torch.randn(10, 3)
    first = FeatureBank(dim=3, count=10, path=tmp_path / "f.npy")
    first.update(features[[4, 2]], torch.tensor([4, 2]))
    first.update(features[[1, 9, 0]], torch.tensor([1, 9, 11]))  # the last is padding
    second = FeatureBank(dim=3, count=10, path=tmp_path / "f.npy")
    second.load_state_dict(first.state_dict())
    second.update(features, torch.arange(10))
    assert torch.equal(second.features, features)
    with pytest.raises(ValueError, match="not float32"):
        FeatureBank(dim=4, count=10, path=tmp_path / "f.npy")


# --- inception score ---

def test_inception_score_of_perfect_and_of_indifferent_samples() -> None:
    perfect = nn.functional.one_hot(torch.arange(100) % 10, 10) * 1000.0
    for logits, expected in ((perfect, 10.0), (torch.zeros(100, 10), 1.0)):
        sums = InceptionScore(classes=10, assignment=equal_splits(100))
        sums.update(logits)
        assert sums.result() == pytest.approx((expected, 0.0))


def test_inception_score_does_not_depend_on_sharding() -> None:
    logits, assignment = 3 * torch.randn(97, 6), shuffled_splits(97)
    whole = InceptionScore(classes=6, assignment=assignment)
    whole.update(logits)
    shards = [InceptionScore(classes=6, assignment=assignment) for _ in range(4)]
    for rank, shard in enumerate(shards):
        for indices in torch.arange(rank, 100, 4).split(5):
            shard.update(logits[indices % 97], indices)
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert shards[0].result() == pytest.approx(whole.result(), rel=1e-12)


def test_splits_partition_the_set() -> None:
    for splits in (shuffled_splits(103), equal_splits(103)):
        assert splits.bincount().min() >= 10 and len(splits.bincount()) == 10
    assert consecutive_splits(12, size=5).tolist() == [0] * 5 + [1] * 5 + [2] * 2
    with pytest.raises(ValueError, match="10 splits"):
        shuffled_splits(7)


def test_incomplete_inception_score_is_refused() -> None:
    sums = InceptionScore(classes=3, assignment=equal_splits(20))
    sums.update(torch.randn(19, 3))
    with pytest.raises(ValueError, match="20 samples needs all of them, got 19"):
        sums.result()


# --- scores ---

def test_scores_do_not_depend_on_batches_or_order() -> None:
    images, labels = toy_images(50), torch.arange(50) % 3
    reference = reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy())
    straight = score([Samples(images, labels)], count=50, reference=reference, extractor=Toy())
    order = torch.randperm(50)
    batches = [Samples(images[rows], labels[rows], rows) for rows in torch.cat([order, order[:9]]).split(8)]
    shuffled = score(batches, count=50, reference=reference, extractor=Toy())
    assert shuffled.fd == pytest.approx(straight.fd, rel=1e-9)
    assert shuffled.inception_score == pytest.approx(straight.inception_score, rel=1e-9)
    assert shuffled.accuracy == straight.accuracy == pytest.approx(
        (Toy()(images)["logits"].argmax(1) == labels).float().mean().item())


def test_scores_need_exactly_the_samples_of_the_protocol() -> None:
    reference = reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy())
    with pytest.raises(ValueError, match="asks for 60 samples, 50 came"):
        score([Samples(toy_images(50))], count=60, reference=reference, extractor=Toy())
    assert score([Samples(toy_images(50))], count=40, reference=reference, extractor=Toy()).accuracy is None


def test_scorer_resumes_from_its_state() -> None:
    images, reference = toy_images(40), reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy())
    first, second = (Scorer(extractor=Toy(), count=40) for _ in range(2))
    first.update(Samples(images[:21], torch.zeros(21)))
    second.load_state_dict(first.state_dict())
    second.update(Samples(images[15:], torch.zeros(25), torch.arange(15, 40)))
    whole = score([Samples(images, torch.zeros(40))], count=40, reference=reference, extractor=Toy())
    assert second.scores(reference).fd == pytest.approx(whole.fd, rel=1e-9)
    assert second.scores(reference).accuracy == whole.accuracy


METRICS = ("fd", "inception_score", "precision_recall", "kid")


def _score_a_share(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    images, labels = toy_images(51), torch.arange(51) % 3
    scorer = Scorer(extractor=Toy(), count=51, metrics=METRICS, kid_subsets=3, kid_size=20,
                    features=f"{folder}/{rank}.npy")
    for indices in torch.arange(rank, 52 + world_size, world_size).split(7):  # ragged, and padded
        scorer.update(Samples(images[indices % 51], labels[indices % 51], indices))
    scorer.all_reduce()
    shards = torch.arange(80).split(9)[rank::world_size]
    bank = FeatureBank(dim=5, count=80)
    reference = reference_statistics([Samples(toy_images(80, seed=1)[rows], None, rows) for rows in shards],
                                     extractor=Toy(), bank=bank, distributed=True)
    torch.save(vars(scorer.scores(reference, distributed=True)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_many_processes_score_as_one(tmp_path: Path, processes: int) -> None:
    mp.spawn(_score_a_share, args=(processes, str(tmp_path)), nprocs=processes)
    reference = reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy(),
                                     bank=FeatureBank(dim=5, count=80))
    whole = vars(score([Samples(toy_images(51), torch.arange(51) % 3)], count=51, reference=reference, extractor=Toy(),
                       metrics=METRICS, kid_subsets=3, kid_size=20))
    for rank in range(processes):
        scores = torch.load(tmp_path / f"{rank}.pt")
        assert scores.pop("sfd") is None
        assert scores == pytest.approx({name: value for name, value in whole.items() if name != "sfd"}, rel=1e-9)




def test_a_scorer_needs_what_its_metrics_need(cache: Path) -> None:
    with pytest.raises(ValueError, match="unknown metric 'fid'"):
        Scorer(extractor=ClassifierFeatures(cache_dir=cache), count=3, splits=1, metrics=("fid",))


class Spread(Toy):
    """Toy's, with spatial features beside: the four corners' mean colours."""

    spatial_dim = 4

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        corners = images.float()[..., ::3, ::3].mean(dim=1).flatten(1)
        return super().extract(images) | {"spatial": corners}


def test_the_spatial_distance_is_that_of_the_spatial_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.randint(0, high, (30, 3, 4, 4), dtype=torch.uint8) for high in (200, 256))
    extractor = Spread()
    reference_statistics([Samples(theirs)], extractor=extractor, name="theirs").save(tmp_path / "theirs.npz")
    reference = Reference.read(tmp_path / "theirs.npz")
    scorer = Scorer(extractor=extractor, count=30, splits=1, metrics=("fd", "sfd"))
    for part in ours.split(13):
        scorer.update(Samples(part))
    scores = scorer.scores(reference)
    features, spatial = ([gaussian(extractor(images)[name]) for images in (ours, theirs)] for name in
                         ("features", "spatial"))
    assert scores.fd == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert scores.sfd == pytest.approx(frechet_distance(*spatial), rel=1e-6) and scores.sfd > 1
    with pytest.raises(ValueError, match="has no statistics of spatial features"):
        scorer.scores(replace(reference, spatial=None))


# --- equal to torch-fidelity ---

class Rows(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Shallow(InceptionFeatures):
    """The 192 features of torch-fidelity's layer of that name: eigenvalues of 2048 x 2048 take it half a minute."""

    dim, spatial_dim = 192, None

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        output = self.activations(images)
        return {"features": output["MaxPool_2"].mean(dim=(2, 3)),
                "logits": output["AvgPool"].flatten(1) @ self.network.fc.weight.T}


def test_scores_equal_torch_fidelitys_on_the_same_network_and_images(inception_file: Path) -> None:
    images, references = smooth_images(8, 0), smooth_images(9, 1)
    layers = {f"feature_layer_{metric}": "192" for metric in ("fid", "kid", "prc")}
    expected = torch_fidelity.calculate_metrics(
        input1=Rows(images), input2=Rows(references), isc=True, fid=True, kid=True, prc=True, cuda=False, verbose=False,
        cache=False, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_file),
        isc_splits=3, kid_subsets=3, kid_subset_size=7, prc_batch_size=7, batch_size=8, **layers)
    extractor = Shallow(weights=inception_file)
    bank = FeatureBank(dim=192, count=9)
    reference = reference_statistics([Samples(references)], extractor=extractor, bank=bank)
    scorer = Scorer(extractor=extractor, count=8, splits=3, kid_subsets=3, kid_size=7,
                    metrics=("fd", "inception_score", "precision_recall", "kid"))
    for part in images.split(5):
        scorer.update(Samples(part))
    own = scorer.scores(reference)
    assert own.fd == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert own.inception_score == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert own.inception_score_std == pytest.approx(expected["inception_score_std"], rel=1e-5)
    assert own.kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)  # float32 kernels there
    features = (bank.features.double() for bank in (scorer.bank, bank))
    exact = kid_features_to_metric(*features, kid_subsets=3, kid_subset_size=7, verbose=False)
    assert own.kid == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-6)
    # torch-fidelity's first input takes the place of the samples
    assert (own.precision, own.recall) == (pytest.approx(expected["precision"]), pytest.approx(expected["recall"]))
    assert own.inception_score > 1.01 and 0 < own.precision < 1


def test_inception_equals_torch_fidelitys_at_every_layer(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = smooth_images(2, 0)
    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    features, logits = network(images)
    extractor = InceptionFeatures(weights=inception_file)
    own = extractor(images)
    assert torch.equal(own["features"], features) and torch.allclose(own["logits"], logits, rtol=1e-6, atol=1e-6)
    assert own["spatial"].shape == (2, 2023)
    other = InceptionFeatures(weights=inception_file, resize="half_pixel")(images)
    assert not torch.allclose(other["features"], features, rtol=0.01)
    with pytest.raises(ValueError, match="unknown resize 'bicubic'"):
        InceptionFeatures(weights=inception_file, resize="bicubic")


# --- extractors ---

def test_digits_classifier_knows_unseen_digits(digits: ClassifierFeatures) -> None:
    heldout = Digits(split="heldout")
    reference = reference_statistics(dataset_samples(heldout), extractor=digits)
    scores = score(dataset_samples(heldout), count=500, reference=reference, extractor=digits)
    assert scores.accuracy >= 0.99 and scores.fd < 1e-6 and scores.inception_score > 8.5
    assert digits.metric == "fd_digits" and not digits.training
    noise = torch.randint(0, 256, (500, 3, 16, 16), dtype=torch.uint8)
    assert score([Samples(noise)], count=500, reference=reference, extractor=digits).fd > 20


def test_classifier_is_cached_by_its_recipe(digits: ClassifierFeatures, cache: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varzoo.eval.features.train_classifier", lambda *_: pytest.fail("trained again"))
    again = ClassifierFeatures(dataset="digits", cache_dir=cache)
    assert again.weights_hash() == digits.weights_hash()
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        ClassifierFeatures(dataset="digits", cache_dir=cache, seed=1)


def test_classifier_training_is_deterministic_and_leaves_the_global_seed_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ClassifierFeatures.RECIPES["digits"], "steps", 3)
    torch.manual_seed(5)
    hashes = {ClassifierFeatures(cache_dir=tmp_path / name).weights_hash() for name in ("a", "b")}
    after = torch.rand(1)
    torch.manual_seed(5)
    assert len(hashes) == 1 and (torch.rand(1) == after).all()


def test_extractors_refuse_other_images(digits: ClassifierFeatures) -> None:
    with pytest.raises(ValueError, match="uint8"):
        digits(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\(16, 16\), got \(8, 8\)"):
        digits(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="fashion_mnist"):
        ClassifierFeatures(dataset="fashion")


def test_inception_features_by_torch_fidelity(inception_file: Path) -> None:
    extractor = InceptionFeatures(weights=inception_file)
    output = extractor(torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8))
    assert output["features"].shape == (2, 2048) and output["logits"].shape == (2, 1008)
    assert extractor.metric == "fd_inception"  # never FID with other weights


def test_only_the_published_weights_make_a_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr("varzoo.eval.inception.WEIGHTS", replace(WEIGHTS, sha256=digest[:8]))
    assert InceptionFeatures(weights=inception_file).metric == "FID"


def test_missing_inception_weights_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # another test may have set it
    monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth.*6726825d.*VARZOO_W"):
        InceptionFeatures()
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        InceptionFeatures(weights=tmp_path / "elsewhere.pth", download=True)
    for folder in (tmp_path / "hub" / "checkpoints", tmp_path / "weights"):  # the latter is preferred
        folder.mkdir(parents=True)
        (folder / WEIGHTS.file).touch()
        assert WEIGHTS.find() == folder / WEIGHTS.file


def test_inception_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="refused"):
        InceptionFeatures(weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_tf32_is_off_inside_and_restored_outside() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)



def test_mobilenet_is_never_a_fid(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v2

    torch.save(mobilenet_v2(weights=None).state_dict(), tmp_path / "net.pth")
    extractor = MobileNetFeatures(weights=tmp_path / "net.pth")
    output = extractor(smooth_images(2, 0))
    assert extractor.metric == "fd_mobilenet" and output["features"].shape == (2, 1280)
    assert output["logits"].shape == (2, 1000)
    with pytest.raises(FileNotFoundError, match=r"fd_mobilenet needs mobilenet_v2-b0353104\.pth .*b0353104"):
        MobileNetFeatures(weights=tmp_path / "none.pth")


# --- reconstructions ---

def test_similarity_of_known_pairs() -> None:
    a, b = torch.rand(3, 3, 12, 14), torch.rand(3, 3, 12, 14)
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20.0] * 3, rel=1e-5)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3) and ssim(a, b).max() < 0.5
    together, alone = ssim(a, b, window="gaussian"), ssim(a[1:2], b[1:2], window="gaussian")
    assert together[1] == pytest.approx(alone.item())
    with pytest.raises(ValueError, match="11 x 11, larger than the images"):
        ssim(a[..., :9], b[..., :9], window="gaussian")
    with pytest.raises(ValueError, match="unknown SSIM window"):
        ssim(a, b, window="box")


def test_pair_scores_are_means_over_images_whatever_the_batches() -> None:
    originals = smooth_images(9, 0)
    decoded = (originals.float() * 0.9).to(torch.uint8)
    results = []
    for size in (9, 4):
        pairs = PairScores(count=9, lpips=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
        for rows in torch.arange(10).split(size):  # one padded
            pairs.update(decoded[rows % 9], originals[rows % 9], rows)
        results.append(pairs.result())
    assert results[0] == pytest.approx(results[1])
    assert results[0]["psnr"] == pytest.approx(psnr(decoded / 255, originals / 255).mean().item())
    with pytest.raises(ValueError, match="do not pair"):
        PairScores(count=9, lpips=None).update(decoded, originals[..., :4], torch.arange(9))
    with pytest.raises(ValueError, match="9 pairs are to be scored, 0 came"):
        PairScores(count=9, lpips=None).result()


def test_codebook_usage_counts_codes_once_per_image() -> None:
    usage = CodebookUsage(size=8, count=3)
    usage.update(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))
    usage.update(torch.tensor([[7, 7], [0, 0], [1, 1]]), torch.tensor([0, 2, 3]))  # seen before; fresh; padding
    assert usage.times.tolist() == [3, 1, 1, 1, 0, 0, 0, 0]
    assert usage.result()["codebook_usage"] == 0.5
    assert usage.result()["codebook_perplexity"] == pytest.approx(2 * 3**0.5)  # of 1/2, 1/6, 1/6, 1/6
    with pytest.raises(ValueError, match=r"0 \.\. 7"):
        CodebookUsage(size=8, count=3).update(torch.tensor([[8]]), torch.tensor([1]))


def test_reference_and_extractor_are_named_by_hash() -> None:
    reference = reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy())
    other = reference_statistics([Samples(toy_images(80, seed=2))], extractor=Toy())
    made = [make_protocol(extractor=Toy(), count=5, reference=statistics, labels="none",
                          uint8_rule="round") for statistics in (reference, other)]
    assert made[0].reference_hash != made[1].reference_hash and made[0].extractor_hash == made[1].extractor_hash
