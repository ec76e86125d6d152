"""Scores do not depend on batches, order or processes; numbers carry their protocol; outputs belong to one run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.inception import write_random_inception
from varzoo.cli.evaluate import main
from varzoo.data import Digits
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import ClassifierFeatures, FeatureExtractor, full_precision
from varzoo.eval.inception import WEIGHTS, InceptionFeatures
from varzoo.eval.inception_score import InceptionScore, consecutive_splits, equal_splits, shuffled_splits
from varzoo.eval.moments import Gaussian, Moments, frechet_distance
from varzoo.eval.protocol import EvalProtocol, append_row, read_rows, result_row
from varzoo.eval.readers import SampleReader
from varzoo.eval.score import Samples, Scorer, dataset_samples, make_protocol, reference_statistics, score
from varzoo.eval.writers import NpzFile, PNGFolder, image_grid


class Toy(FeatureExtractor):
    """Five linear features of 4 x 4 images, three classes."""

    name, metric, dim, classes = "toy", "fd_toy", 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 48, generator=torch.Generator().manual_seed(0)) / 400)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        output = (images.flatten(1).float() - 128) @ self.weight.T
        return {"features": output[:, :5], "logits": 4 * output[:, 5:]}


def toy_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


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


# --- extractors ---

@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("varzoo-cache")


@pytest.fixture(scope="session")
def digits(cache: Path) -> ClassifierFeatures:
    return ClassifierFeatures(dataset="digits", cache_dir=cache)


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


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "random.pth")


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


# --- protocols and rows ---

def protocol(**changes) -> EvalProtocol:
    fields = {"metric": "fd_toy", "extractor": "toy", "extractor_hash": "a", "count": 10, "labels": "balanced",
              "uint8_rule": "round", "reference": "r", "reference_hash": "b"}
    return EvalProtocol(**{**fields, **changes})


def test_a_proxys_distance_is_never_called_fid() -> None:
    with pytest.raises(ValueError, match="not a FID; call it fd_toy"):
        protocol(metric="FID")


def test_protocol_hash_covers_every_field() -> None:
    changes = [{"metric": "fd_x"}, {"extractor": "x"}, {"extractor_hash": "x"}, {"count": 11}, {"labels": "random"},
               {"uint8_rule": "truncate"}, {"reference": "x"}, {"reference_hash": "x"}, {"precision": "bf16"},
               {"is_splits": 5}, {"is_formula": "consecutive"}, {"family": "adm"}, {"departures": ("count",)},
               {"image_size": (4, 4)}, {"resize": "bicubic"}, {"extractor_resize": "tf1"}, {"reference_type": "train"},
               {"covariance": "biased"}, {"manifold": "k=3"}, {"frames": 16}, {"kid": "9 x 9"}, {"pairs": "x"}]
    assert len({protocol(**change).hash for change in [{}, *changes]}) == len(changes) + 1
    assert set().union(*changes) == set(EvalProtocol.__dataclass_fields__)


def test_rows_are_appended_with_protocol_and_versions(tmp_path: Path) -> None:
    for value in (1.5, 2.5):
        row = result_row(protocol(), {"fd": value}, seconds=3.0, run={"seed": 1})
        append_row(tmp_path / "deep" / "results.jsonl", row)
    rows = read_rows(tmp_path / "deep" / "results.jsonl")
    assert [row["fd"] for row in rows] == [1.5, 2.5]
    assert rows[0]["protocol"]["hash"] == protocol().hash and rows[0]["versions"]["torch"]


# --- files of samples ---

def test_png_folder_round_trip(tmp_path: Path) -> None:
    images, labels = toy_images(7), [3, 1, 4, 1, 5, 9, 2]
    writer = PNGFolder(folder=tmp_path / "s", manifest={"seed": 1, "scale": (1, 2)})
    writer.write(images[4:], [4, 5, 6], labels[4:])
    assert writer.missing(range(7)) == [0, 1, 2, 3]
    again = PNGFolder(folder=tmp_path / "s", manifest={"seed": 1, "scale": (1, 2)})  # resumed
    again.write(images[:4], torch.arange(4), torch.tensor(labels[:4]))
    assert again.missing(range(7)) == []
    reader = SampleReader(path=tmp_path / "s", batch_size=3)
    batches = list(reader)
    assert len(reader) == 7 and reader.manifest["seed"] == 1
    assert (torch.cat([batch.images for batch in batches]) == images).all()
    assert torch.cat([batch.labels for batch in batches]).tolist() == labels
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))


def test_npz_round_trip_and_adm_layout(tmp_path: Path) -> None:
    images, labels = toy_images(300), torch.arange(300) % 7
    options = {"path": tmp_path / "s.npz", "manifest": {"seed": 1}, "count": 300, "image_size": (4, 4)}
    writer = NpzFile(**options)
    writer.write(images[100:], range(100, 300), labels[100:])
    with pytest.raises(ValueError, match="100 of 300 samples are missing, the first is 0"):
        writer.close()
    again = NpzFile(**options)  # resumed
    assert again.missing(range(300)) == list(range(100))
    again.write(images[:100], range(100), labels[:100])
    again.close()
    with np.load(tmp_path / "s.npz") as file:
        assert (file["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all() and file["arr_0"].dtype == np.uint8
        assert (file["arr_1"] == labels.numpy()).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    reader = SampleReader(path=tmp_path / "s.npz", batch_size=7)
    batches = list(reader)
    assert (torch.cat([batch.images for batch in batches]) == images).all() and len(reader) == 300
    assert (torch.cat([batch.labels for batch in batches]) == labels).all() and reader.manifest["seed"] == 1
    assert NpzFile(**options).missing(range(300)) == []
    with pytest.raises(ValueError, match="another run: seed was 1, now 2"):
        NpzFile(**{**options, "manifest": {"seed": 2}})


def test_unlabelled_npz_of_another_origin_is_read(tmp_path: Path) -> None:
    images = toy_images(5)
    np.savez_compressed(tmp_path / "s.npz", images.permute(0, 2, 3, 1).numpy())
    reader = SampleReader(path=tmp_path / "s.npz", batch_size=2)
    assert (torch.cat([batch.images for batch in reader]) == images).all()
    assert reader.manifest == {} and next(iter(reader)).labels is None
    labelled = SampleReader(path=tmp_path / "s.npz", labels=[5, 4, 3, 2, 1], batch_size=2)
    assert torch.cat([batch.labels for batch in labelled]).tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("sink", [
    lambda path, manifest: PNGFolder(folder=path, manifest=manifest),
    lambda path, manifest: NpzFile(path=path, manifest=manifest, count=9, image_size=(4, 4)),
])
def test_another_runs_output_is_refused(tmp_path: Path, sink) -> None:
    writer = sink(tmp_path / "s", {"seed": 1, "guidance": 3.0})
    writer.write(toy_images(2), [0, 1])
    with pytest.raises(ValueError, match=r"another run: seed was 1, now 2"):
        sink(tmp_path / "s", {"seed": 2, "guidance": 3.0})
    assert sink(tmp_path / "s", {"seed": 1, "guidance": 3.0}).existing() == {0, 1}


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no output of varzoo"):
        PNGFolder(folder=tmp_path, manifest={})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    writer = PNGFolder(folder=tmp_path / "s", manifest={})
    with pytest.raises(ValueError, match="uint8"):
        writer.write(torch.zeros(1, 3, 4, 4), [0])
    with pytest.raises(ValueError, match="2 images need as many"):
        writer.write(toy_images(2), [0])
    npz = NpzFile(path=tmp_path / "s.npz", manifest={}, count=3, image_size=(4, 4))
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        npz.write(toy_images(2), [2, 3])
    with pytest.raises(ValueError, match="no samples"):
        SampleReader(path=tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SampleReader(path=tmp_path / "nowhere")
    writer.write(toy_images(2), [0, 1])
    with pytest.raises(ValueError, match="2 samples, but 3 labels"):
        SampleReader(path=tmp_path / "s", labels=[1, 2, 3])


def test_grid_puts_names_beside_rows() -> None:
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    images[3:] = 100
    grid = image_grid(images, ["no", "yes"], scale=2, padding=2)
    pixels = np.asarray(grid)
    assert pixels.shape[0] == 2 * 34 + 2
    right = pixels[:, -(3 * 34 + 2):]  # the images
    assert (right[2:34, 2:34] == 0).all() and (right[36:68, -34:-2] == 100).all()
    margin = pixels[:, :-(3 * 34 + 2)]
    assert (margin[:34] < 128).any() and (margin[34:] < 128).any() and (margin[:, :2] == 255).all()
    with pytest.raises(ValueError, match="6 images cannot fill 4 rows"):
        image_grid(images, list("abcd"))


# --- the command ---

@pytest.fixture
def run(digits: ClassifierFeatures, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of 60 real digits as samples."""
    monkeypatch.setenv("VARZOO_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    writer = PNGFolder(folder="samples", manifest={"count": 60, "uint8_rule": "round", "label_scheme": "as in the set"})
    batch = next(iter(dataset_samples(Digits(split="train"), batch_size=60)))
    writer.write(batch.images, batch.indices, batch.labels)
    return tmp_path


def test_command_scores_a_folder_and_appends_a_row(run: Path, capsys: pytest.CaptureFixture) -> None:
    row = main(["samples=samples", "reference=digits", "extractor=digits"])
    assert read_rows("results.jsonl") == [json.loads(json.dumps(row))]
    assert row["accuracy"] == 1.0 and row["count"] == 60 and 0 < row["fd"] < 100
    assert row["protocol"]["metric"] == "fd_digits" and row["protocol"]["uint8_rule"] == "round"
    printed = capsys.readouterr().out
    assert "fd_digits" in printed and "FID" not in printed and row["protocol"]["hash"] in printed


def test_command_takes_stored_statistics_images_and_labels(run: Path, digits: ClassifierFeatures) -> None:
    reference = reference_statistics(dataset_samples(Digits(split="heldout")), extractor=digits)
    np.savez("stats.npz", mu=reference.gaussian.mean, sigma=reference.gaussian.covariance)
    by_name, by_file = (main(["samples=samples", f"reference={name}", "extractor=digits", *more])
                        for name, *more in (["digits"], ["stats.npz", "reference_type=validation"]))
    assert by_name["fd"] == pytest.approx(by_file["fd"], rel=1e-5)
    assert main(["samples=samples", "reference=samples", "extractor=digits"])["fd"] < 1e-6
    Path("labels.txt").write_text("0\n" * 60)
    row = main(["samples=samples", "reference=digits", "extractor=digits", "labels=labels.txt"])
    assert row["accuracy"] == pytest.approx((Digits().labels[:60] == 0).float().mean().item())


@pytest.mark.parametrize(("arguments", "message"), [
    (["sample=x"], "Did you mean 'samples'"),
    (["samples"], "option=value"),
    (["samples=samples", "reference=digits"], "extractor must be given"),
    (["samples=samples", "reference=digits", "extractor=resnet"], "unknown extractor"),
    (["samples=samples", "reference=mnist", "extractor=digits"], "unknown reference"),
    (["samples=samples", "reference=digits", "extractor=digits", "splits=0"], "splits must be a positive"),
    (["samples=samples", "reference=digits", "extractor=digits", "download=yes"], "unknown download"),
    (["samples=samples", "reference=digits", "extractor=digits", "weights=x.pth"], "trains its own classifier"),
    (["samples=samples", "reference=digits", "extractor=digits", "labels=none.txt"], "one class number per line"),
])
def test_command_refuses_with_one_clear_error(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert not Path("results.jsonl").exists()


def test_command_refuses_a_run_that_stopped_early(run: Path) -> None:
    Path("samples/000031.png").unlink()
    with pytest.raises(ValueError, match="asks for 60 samples, 59 came"):
        main(["samples=samples", "reference=digits", "extractor=digits"])


def test_command_compares_inception_features_with_adm_statistics(run: Path, inception_file: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    mean = np.arange(2048, dtype=np.float32)
    np.savez("adm.npz", mu=mean, sigma=np.eye(2048), arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    PNGFolder(folder="few", manifest={}).write(toy_images(2), [0, 1])
    with pytest.raises(ValueError, match="2048 dimensions, the samples of 64"):
        main(["samples=samples", "reference=adm.npz", "reference_type=train", "extractor=digits"])
    # eigenvalues of 2048 x 2048 take seconds, and other tests see to them
    monkeypatch.setattr("varzoo.eval.score.frechet_distance", lambda a, b: float((b.mean - a.mean).mean()))
    row = main(["samples=few", "reference=adm.npz", "reference_type=train", "extractor=inception",
                f"weights={inception_file}", "splits=1"])
    assert row["protocol"]["metric"] == "fd_inception" and row["accuracy"] is None
    assert row["fd"] == pytest.approx(mean.mean(), rel=0.01)


def test_reference_and_extractor_are_named_by_hash() -> None:
    reference = reference_statistics([Samples(toy_images(80, seed=1))], extractor=Toy())
    other = reference_statistics([Samples(toy_images(80, seed=2))], extractor=Toy())
    made = [make_protocol(extractor=Toy(), count=5, reference=statistics, labels="none",
                          uint8_rule="round") for statistics in (reference, other)]
    assert made[0].reference_hash != made[1].reference_hash and made[0].extractor_hash == made[1].extractor_hash
