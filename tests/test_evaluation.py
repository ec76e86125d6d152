"""Numbers equal torch-fidelity's, carry their protocol or are refused, and survive kills."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch_fidelity
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.metric_kid import kid_features_to_metric

from tests.inception import write_random_inception
from varzoo.cli.evaluate import main
from varzoo.core.weights import WeightsFile
from varzoo.data import Digits
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.inception import InceptionFeatures
from varzoo.eval.kernel_distance import kernel_distance, polynomial_mmd, subset_indices
from varzoo.eval.manifold import neighbour_radii, precision_recall
from varzoo.eval.moments import Moments, frechet_distance
from varzoo.eval.pretrained import MobileNetFeatures
from varzoo.eval.protocol import PROTOCOLS, EvalProtocol, agree, differences, find_protocol, read_rows
from varzoo.eval.readers import SampleReader
from varzoo.eval.reconstruction import CodebookUsage, PairScores
from varzoo.eval.references import Reference
from varzoo.eval.score import Samples, Scorer, dataset_samples, reference_statistics
from varzoo.eval.similarity import psnr, ssim
from varzoo.eval.video import VideoFeatures
from varzoo.eval.writers import NpzFile, PNGFolder


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varzoo-cache")
    ClassifierFeatures(dataset="digits", cache_dir=folder)  # trained once
    return folder


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `samples`, a run of 60 real digits."""
    monkeypatch.setenv("VARZOO_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    writer = PNGFolder(folder="samples", manifest={"count": 60, "uint8_rule": "round", "label_scheme": "as in the set"})
    batch = next(iter(dataset_samples(Digits(split="train"), batch_size=60)))
    writer.write(batch.images, batch.indices, batch.labels)
    return tmp_path


def smooth_images(count: int, seed: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) ** (1 + seed)
    return (255 * nn.functional.interpolate(coarse, size=(20, 28), mode="bilinear")).to(torch.uint8)


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


# --- distances ---

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


# --- protocols ---

def test_named_protocols_are_what_the_field_does() -> None:
    assert PROTOCOLS["adm"].is_formula == "consecutive" and PROTOCOLS["torch_fidelity"].is_formula == "shuffled"
    assert PROTOCOLS["pytorch_fid"].extractor_resize == "half_pixel"
    assert PROTOCOLS["tokenizer"].reference_type == "validation"
    assert {name: PROTOCOLS[name].covariance for name in PROTOCOLS if name.startswith("fvd")} == {
        "fvd_larp": "biased", "fvd_styleganv": "unbiased", "fvd_videogpt": "unbiased"}
    assert len({protocol.hash for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    with pytest.raises(ValueError, match="Did you mean 'adm'"):
        find_protocol("amd")


def measured(**changes: object) -> EvalProtocol:
    fields = {"labels": "random", "uint8_rule": "half_up", "resize": "none", "reference": "imagenet256_train",
              "reference_hash": "x"}
    return replace(PROTOCOLS["adm"], family="own", **{**fields, **changes})


def test_departures_are_refused_unless_asked_for_by_name() -> None:
    agreed = agree(PROTOCOLS["adm"], measured())
    assert agreed.family == agreed.title == "adm" and agreed.departures == ()
    with pytest.raises(ValueError, match=r"not the protocol 'adm': count is 49999, .*'s is 50000.*allow=count"):
        agree(PROTOCOLS["adm"], measured(count=49999))
    with pytest.raises(ValueError, match=r"reference_type is 'validation', the protocol's is 'train'.*"):
        agree(PROTOCOLS["adm"], measured(reference_type="validation", count=3), ["count"])
    with pytest.raises(ValueError, match="reference_type is 'train', the protocol's is 'validation'"):
        agree(PROTOCOLS["tokenizer"], measured(metric="rFID"))
    departed = agree(PROTOCOLS["adm"], measured(count=3), ["count"])
    assert departed.departures == ("count",) and departed.title == "adm, departing in count"
    assert departed.hash != agreed.hash
    with pytest.raises(ValueError, match="unknown protocol field to depart from 'counts'"):
        agree(PROTOCOLS["adm"], measured(), ["counts"])
    assert differences(PROTOCOLS["adm"], measured(is_splits=5)) == {"is_splits": (10, 5)}
    assert not differences(PROTOCOLS["adm"], measured(kid="100 x 1000"))  # more is no departure


def test_weights_are_found_by_path_variable_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = WeightsFile(file="net.pth", sha256="abc", url=None, purpose="FD", origin="its page")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path / "own"))
    with pytest.raises(FileNotFoundError, match=r"FD needs net\.pth \(its sha256 begins with abc; its page has it\)"):
        file.find(download=True)
    for path in (tmp_path / "home/hub/checkpoints/net.pth", tmp_path / "own/net.pth", tmp_path / "given.pth"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert file.find(path if path.name == "given.pth" else None) == path


# --- references ---

def test_reference_files_keep_their_type_and_extractor(folder: Path) -> None:
    path = main(["reference=build", "data=digits_train", "extractor=digits", "features=true", "out=stats.npz"])
    reference = Reference.read(path)
    assert (reference.kind, reference.count, reference.features.shape) == ("train", 1297, (1297, 64))
    by_file = main(["samples=samples", "reference=stats.npz", "extractor=digits", "also=precision_recall,kid",
                    "kid_size=20"])
    by_name = main(["samples=samples", "reference=digits_train", "extractor=digits", "also=precision_recall,kid",
                    "kid_size=20"])
    for name in ("fd", "precision", "recall", "kid", "inception_score"):
        assert by_file[name] == pytest.approx(by_name[name], rel=1e-9), name
    assert by_file["precision"] == 1.0 > by_file["recall"]  # the samples are among the references
    with pytest.raises(ValueError, match="is of type 'train', not 'validation'"):
        main(["samples=samples", "reference=stats.npz", "reference_type=validation", "extractor=digits"])
    assert not list(folder.glob("*.features"))
    with np.load(path) as file:  # what ADM's evaluator and torch-fidelity's fork want
        assert file["mu"].dtype == np.float32 and file["sigma"].dtype == np.float64


def test_adms_reference_brings_images_for_precision_and_recall(folder: Path) -> None:
    images = next(iter(dataset_samples(Digits(split="heldout"), batch_size=80))).images
    main(["reference=build", "data=digits", "extractor=digits", "out=stats.npz"])
    with np.load("stats.npz") as file:
        np.savez("VIRTUAL_imagenet256_labeled.npz", mu=file["mu"], sigma=file["sigma"],
                 arr_0=images.permute(0, 2, 3, 1).numpy())
    row = main(["samples=samples", "reference=VIRTUAL_imagenet256_labeled.npz", "extractor=digits",
                "also=precision_recall"])
    assert row["protocol"]["reference_type"] == "train" and 0 < row["precision"] < 1
    with pytest.raises(ValueError, match="has no features, which precision, recall and KID need"):
        main(["samples=samples", "reference=stats.npz", "extractor=digits", "also=kid"])


# --- the command ---

def test_command_refuses_what_is_not_the_protocol(folder: Path, inception_file: Path) -> None:
    np.savez("adm_in256_stats.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    arguments = ["samples=samples", "reference=adm_in256_stats.npz", f"weights={inception_file}"]
    with pytest.raises(ValueError, match=r"extractor_hash is '\w+', the protocol's is '6726825d'; count is 60, .* "
                                          "50000; "
                                         r"labels is 'as in the set', the protocol's is '50 per label, sorted'"):
        main([*arguments, "protocol=torch_fidelity"])
    with pytest.raises(ValueError, match="reference_type is 'train', the protocol's is 'validation'"):
        main([*arguments, "protocol=tokenizer"])
    assert not Path("results.jsonl").exists()
    with pytest.raises(ValueError, match=r"allow= departs from a protocol"):
        main([*arguments, "extractor=inception", "allow=count"])


def test_a_departing_row_says_so(folder: Path, inception_file: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture) -> None:
    np.savez("adm_in256_stats.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    PNGFolder(folder="few", manifest={"uint8_rule": "round", "label_scheme": "50 per label, sorted"}).write(
        smooth_images(2, 0), [0, 1])
    monkeypatch.setattr("varzoo.eval.score.frechet_distance", lambda a, b: 1.0)  # eigenvalues take seconds
    row = main(["samples=few", "reference=adm_in256_stats.npz", f"weights={inception_file}", "protocol=torch_fidelity",
                "allow=count,extractor_hash,is_splits", "splits=1"])
    assert row["protocol"]["departures"] == ("count", "extractor_hash", "is_splits")
    assert json.loads(Path("results.jsonl").read_text())["protocol"]["hash"] == row["protocol"]["hash"]
    printed = capsys.readouterr().out
    assert "torch_fidelity, departing in count, extractor_hash, is_splits" in printed and "fd_inception 1.0" in printed


def test_pairs_of_reconstructions_and_originals(folder: Path) -> None:
    originals = next(iter(dataset_samples(Digits(split="train"), batch_size=60))).images
    PNGFolder(folder="decoded", manifest={}).write(originals // 2, range(60))
    row = main(["samples=decoded", "reference=samples", "reference_type=validation", "extractor=digits", "also=pairs",
                "lpips=none", "batch_size=7"])
    assert row["psnr"] == pytest.approx(psnr(originals // 2 / 255, originals / 255).mean().item(), rel=1e-6)
    assert row["protocol"]["reference_type"] == "validation" and "lpips" not in row
    with pytest.raises(ValueError, match="is no file or folder"):
        main(["samples=decoded", "reference=digits", "extractor=digits", "also=pairs", "lpips=none"])
    PNGFolder(folder="fewer", manifest={}).write(originals[:50], range(50))
    with pytest.raises(ValueError, match="50 reconstructions and 60 originals do not pair"):
        main(["samples=fewer", "reference=samples", "extractor=digits", "also=pairs", "lpips=none"])


def _command(rank: int, arguments: list[str], port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    main(arguments)


def test_the_same_command_runs_in_many_processes(folder: Path) -> None:
    arguments = ["samples=samples", "reference=digits", "extractor=digits", "batch_size=7", "kid_size=9",
                 "also=precision_recall,kid"]
    alone = main(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_command, args=([*arguments, "results=many.jsonl", "state=pass"], port), nprocs=2)
    (together,) = read_rows("many.jsonl")  # one row, by the first process
    for name in ("fd", "inception_score", "precision", "recall", "kid", "accuracy"):
        assert together[name] == pytest.approx(alone[name], rel=1e-9), name
    assert together["protocol"]["reference_hash"] == alone["protocol"]["reference_hash"] and not Path("pass").exists()


# --- bad input ---

def test_bad_files_of_samples_give_one_clear_error(folder: Path) -> None:
    images = next(iter(dataset_samples(Digits(split="train"), batch_size=60))).images.permute(0, 2, 3, 1).numpy()
    score_ = ["reference=digits", "extractor=digits"]
    for name, array, message in (
            ("floats", images / 255, r"must be uint8 \[N, H, W, 3\].* it is float64 \(60, 16, 16, 3\)"),
            ("nchw", images.transpose(0, 3, 1, 2), r"it is uint8 \(60, 3, 16, 16\)")):
        np.savez(f"{name}.npz", np.ascontiguousarray(array))
        with pytest.raises(ValueError, match=message):
            main([f"samples={name}.npz", *score_])
    np.savez("whole.npz", images)
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:-20000])
    with pytest.raises(ValueError, match=r"cut\.npz is no file of samples"):
        main(["samples=cut.npz", *score_])
    png = Path("samples/000031.png")
    png.write_bytes(png.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"000031\.png is truncated or no image .* delete it and draw it again"):
        main(["samples=samples", *score_])
    Image.new("RGB", (8, 8)).save(png)
    with pytest.raises(ValueError, match="images of different sizes"):
        main(["samples=samples", *score_])
    assert not Path("results.jsonl").exists()


def test_bad_references_give_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("untyped.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="does not say what it holds; give reference_type=train"):
        main(["samples=samples", "reference=untyped.npz", "extractor=digits"])
    np.savez("nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"mu or sigma of nan\.npz is not finite"):
        main(["samples=samples", "reference=nan.npz", "reference_type=train", "extractor=digits"])
    Path("text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is no \.npz file"):
        main(["samples=samples", "reference=text.npz", "extractor=digits"])
    main(["reference=build", "data=digits", "extractor=digits", "out=stats.npz"])
    monkeypatch.setattr(ClassifierFeatures, "weights_hash", lambda self: "others")
    with pytest.raises(ValueError, match=r"statistics of extractor digits .*the samples are looked at by .* others"):
        main(["samples=samples", "reference=stats.npz", "extractor=digits"])


def test_features_that_are_not_finite_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = ClassifierFeatures.extract

    def broken(self: ClassifierFeatures, images: Tensor) -> dict[str, Tensor]:
        output = extract(self, images)
        return output | {"features": output["features"].log()}

    main(["reference=build", "data=digits", "extractor=digits", "out=stats.npz"])
    monkeypatch.setattr(ClassifierFeatures, "extract", broken)
    with pytest.raises(ValueError, match="features are not finite"):
        main(["samples=samples", "reference=stats.npz", "extractor=digits"])


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "what shall be done"),
    (["reference=build", "data=digits", "out=x.npz"], "extractor must be given"),
    (["reference=build", "extractor=digits", "out=x.npz"], "data must be given"),
    (["samples=samples", "reference=digits", "extractor=digits", "seed=3"], "seed has no meaning here"),
    (["samples=samples", "reference=digits", "extractor=digits", "also=psnr"], "unknown metric 'psnr'"),
    (["samples=samples", "reference=digits", "extractor=digits", "uint8_rule=truncate"], "manifest says uint8_rule"),
    (["samples=samples", "reference=digits", "extractor=digits", "also=sfd"], "no spatial features"),
    (["samples=samples", "reference=digits", "extractor=digits", "reference_type=train"], "of type 'validation', not"),
    (["samples=samples", "reference=samples", "extractor=digits", "reference_type=test"], "unknown reference type"),
    (["samples=samples", "reference=digits", "extractor=digits", "device=cuda"], "has no such device"),
])
def test_command_refuses_with_one_clear_error(folder: Path, arguments: list[str], message: str) -> None:
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has such a device")
    with pytest.raises(ValueError, match=message):
        main(arguments)


# --- kills ---

def killed(work: Callable[[], object]) -> bool:
    """Whether `work`, in a process of its own, was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the process failed instead"
    return os.WIFSIGNALED(status)


def kills_at(call: int, function: Callable) -> Callable:
    """The function, in place of whose `call`-th call the process dies without a chance to clean up."""
    calls = 0

    def dying(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    return dying


def test_scoring_that_is_killed_goes_on_to_the_same_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["reference=build", "data=digits", "extractor=digits", "features=true", "out=stats.npz"])
    arguments = ["samples=samples", "reference=stats.npz", "extractor=digits", "batch_size=7", "kid_size=9",
                 "also=precision_recall,kid"]
    expected = {name: value for name, value in main(arguments).items() if name != "seconds"}
    monkeypatch.setattr("varzoo.cli.measuring.SAVE_EVERY", 2)
    chance, update, extract = random.Random(0), FeatureBank.update, ClassifierFeatures.extract
    for attempt in range(20):
        kills = 0
        for owner, name, function in ((FeatureBank, "update", update), (ClassifierFeatures, "extract", extract)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, kills_at(chance.randint(1, 9), function))
                kills += killed(lambda state=attempt: main([*arguments, f"state=pass{state}", "results=none.jsonl"]))
        extractions = []
        with monkeypatch.context() as patch:
            patch.setattr(ClassifierFeatures, "extract", lambda self, images, seen=extractions: (
                seen.append(len(images)), extract(self, images))[1])
            row = main([*arguments, f"state=pass{attempt}"])
        assert {name: value for name, value in row.items() if name != "seconds"} == expected
        assert not Path(f"pass{attempt}").exists() and sum(extractions) <= 60
    assert kills  # of the last attempt at least


def test_sampling_that_is_killed_goes_on_with_no_image_missing_or_doubled(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    images, chance, deaths = smooth_images(24, 0), random.Random(1), 0

    def draw(make: Callable) -> None:
        writer = make()
        missing = writer.missing(range(24))
        for start in range(0, len(missing), 5):
            rows = missing[start:start + 5]
            writer.write(images[rows], rows, rows)
        writer.close()

    for attempt in range(20):
        png = lambda path=tmp_path / f"png{attempt}": PNGFolder(folder=path, manifest={"count": 24})  # noqa: E731
        npz = lambda path=tmp_path / f"{attempt}.npz": NpzFile(  # noqa: E731
            path=path, manifest={}, count=24, image_size=(20, 28))
        for make, module, name in ((png, "varzoo.eval.writers", "to_pil_image"), (npz, "numpy", "flatnonzero"),
                                   (npz, "numpy", "ascontiguousarray"), (png, "os", "replace"), (npz, "os", "replace")):
            with monkeypatch.context() as patch:
                owner = __import__(module, fromlist=[name])
                patch.setattr(owner, name, kills_at(chance.randint(1, 12), getattr(owner, name)))
                deaths += killed(lambda make=make: draw(make))
        for make, path in ((png, tmp_path / f"png{attempt}"), (npz, tmp_path / f"{attempt}.npz")):
            draw(make)
            batches = list(SampleReader(path=path))
            assert torch.equal(torch.cat([batch.images for batch in batches]), images)
            assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(24))
    assert deaths > 20


# --- clips ---

class Clip400(nn.Module):
    """In place of the TorchScript I3D, with its signature."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        side = 128 if resize else 224
        means = nn.functional.adaptive_avg_pool3d(x, [4, 10, 10]).flatten(1) * side
        return means[:, :400]


def test_fvd_of_clips_in_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Clip400()).save("i3d.pt")
    clips = np.random.default_rng(0).random((6, 16, 12, 14, 3), np.float32)
    np.savez("real.npz", clips)
    np.savez("fake.npz", clips[:4])
    rows = {}
    for protocol in ("fvd_larp", "fvd_styleganv"):
        row = rows[protocol] = main(["samples=fake.npz", "reference=real.npz", f"protocol={protocol}", "weights=i3d.pt",
                                     "allow=count", "uint8_rule=none"])
        assert row["protocol"]["metric"] == "FVD" and row["protocol"]["frames"] == 16
    extractor = VideoFeatures(resize="inside", weights="i3d.pt")
    real, fake = Moments(dim=400), Moments(dim=400)
    for moments, count in ((real, 6), (fake, 4)):
        moments.update(extractor(torch.from_numpy(clips[:count]).movedim(-1, 2))["features"])
    expected = frechet_distance(fake.gaussian(biased=True), real.gaussian(biased=True))
    assert rows["fvd_larp"]["fd"] == pytest.approx(expected, rel=1e-6)
    assert rows["fvd_styleganv"]["fd"] != pytest.approx(rows["fvd_larp"]["fd"], rel=1e-3)
    np.savez("short.npz", clips[:, :8])
    with pytest.raises(ValueError, match="frames is 8, the protocol's is 16"):
        main(["samples=short.npz", "reference=real.npz", "protocol=fvd_larp", "weights=i3d.pt", "allow=count",
              "uint8_rule=none"])
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        extractor(torch.zeros(1, 8, 3, 12, 14))
    with pytest.raises(FileNotFoundError, match=r"FVD .* needs i3d_torchscript\.pt"):
        VideoFeatures(resize="inside")


# --- other extractors ---

def test_mobilenet_is_never_a_fid(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v2

    torch.save(mobilenet_v2(weights=None).state_dict(), tmp_path / "net.pth")
    extractor = MobileNetFeatures(weights=tmp_path / "net.pth")
    output = extractor(smooth_images(2, 0))
    assert extractor.metric == "fd_mobilenet" and output["features"].shape == (2, 1280)
    assert output["logits"].shape == (2, 1000)
    with pytest.raises(FileNotFoundError, match=r"fd_mobilenet needs mobilenet_v2-b0353104\.pth .*b0353104"):
        MobileNetFeatures(weights=tmp_path / "none.pth")


def test_a_scorer_needs_what_its_metrics_need(cache: Path) -> None:
    with pytest.raises(ValueError, match="unknown metric 'fid'"):
        Scorer(extractor=ClassifierFeatures(cache_dir=cache), count=3, splits=1, metrics=("fid",))
