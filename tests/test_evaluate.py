"""The command of evaluation: a number carries its protocol or is refused, and a pass survives kills."""

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
from PIL import Image
from torch import Tensor, nn

from tests.images import smooth_images
from varzoo.cli.evaluate import main
from varzoo.core.weights import WeightsFile
from varzoo.data import Digits
from varzoo.eval.feature_bank import FeatureBank
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.i3d import I3D
from varzoo.eval.moments import Moments, frechet_distance
from varzoo.eval.protocol import (
    PROTOCOLS,
    EvalProtocol,
    agree,
    append_row,
    differences,
    find_protocol,
    read_rows,
    result_row,
)
from varzoo.eval.readers import SampleReader
from varzoo.eval.references import Reference
from varzoo.eval.score import dataset_samples, reference_statistics
from varzoo.eval.similarity import psnr
from varzoo.eval.video import VideoFeatures
from varzoo.eval.writers import NpzFile, PNGFolder

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

def test_command_scores_a_folder_and_appends_a_row(folder: Path, capsys: pytest.CaptureFixture) -> None:
    row = main(["samples=samples", "reference=digits", "extractor=digits"])
    assert read_rows("results.jsonl") == [json.loads(json.dumps(row))]
    assert row["accuracy"] == 1.0 and row["count"] == 60 and 0 < row["fd"] < 100
    assert row["protocol"]["metric"] == "fd_digits" and row["protocol"]["uint8_rule"] == "round"
    printed = capsys.readouterr().out
    assert "fd_digits" in printed and "FID" not in printed and row["protocol"]["hash"] in printed


def test_command_takes_stored_statistics_images_and_labels(folder: Path, digits: ClassifierFeatures) -> None:
    reference = reference_statistics(dataset_samples(Digits(split="heldout")), extractor=digits)
    np.savez("stats.npz", mu=reference.gaussian.mean, sigma=reference.gaussian.covariance)
    by_name, by_file = (main(["samples=samples", f"reference={name}", "extractor=digits", *more])
                        for name, *more in (["digits"], ["stats.npz", "reference_type=validation"]))
    assert by_name["fd"] == pytest.approx(by_file["fd"], rel=1e-5)
    assert main(["samples=samples", "reference=samples", "extractor=digits"])["fd"] < 1e-6
    Path("labels.txt").write_text("0\n" * 60)
    row = main(["samples=samples", "reference=digits", "extractor=digits", "labels=labels.txt"])
    assert row["accuracy"] == pytest.approx((Digits().labels[:60] == 0).float().mean().item())


def test_command_refuses_a_run_that_stopped_early(folder: Path) -> None:
    Path("samples/000031.png").unlink()
    with pytest.raises(ValueError, match="asks for 60 samples, 59 came"):
        main(["samples=samples", "reference=digits", "extractor=digits"])


def test_command_compares_inception_features_with_adm_statistics(folder: Path, inception_file: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    mean = np.arange(2048, dtype=np.float32)
    np.savez("adm.npz", mu=mean, sigma=np.eye(2048), arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    PNGFolder(folder="few", manifest={}).write(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), [0, 1])
    with pytest.raises(ValueError, match="2048 dimensions, the samples of 64"):
        main(["samples=samples", "reference=adm.npz", "reference_type=train", "extractor=digits"])
    # eigenvalues of 2048 x 2048 take seconds, and other tests see to them
    monkeypatch.setattr("varzoo.eval.score.frechet_distance", lambda a, b: float((b.mean - a.mean).mean()))
    row = main(["samples=few", "reference=adm.npz", "reference_type=train", "extractor=inception",
                f"weights={inception_file}", "splits=1"])
    assert row["protocol"]["metric"] == "fd_inception" and row["accuracy"] is None
    assert row["fd"] == pytest.approx(mean.mean(), rel=0.01)



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
    for name in ("inception_score", "precision", "recall", "kid", "accuracy"):
        assert together[name] == pytest.approx(alone[name], rel=1e-9), name
    # 60 samples of 64 features: some eigenvalues are 0 but for rounding, and the distance sums their roots
    assert together["fd"] == pytest.approx(alone["fd"], rel=1e-7)
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
    (["sample=x"], "Did you mean 'samples'"),
    (["samples"], "option=value"),
    (["samples=samples", "reference=digits"], "extractor must be given"),
    (["samples=samples", "reference=digits", "extractor=resnet"], "unknown extractor"),
    (["samples=samples", "reference=mnist", "extractor=digits"], "unknown reference"),
    (["samples=samples", "reference=digits", "extractor=digits", "splits=0"], "splits must be a positive"),
    (["samples=samples", "reference=digits", "extractor=digits", "download=yes"], "unknown download"),
    (["samples=samples", "reference=digits", "extractor=digits", "weights=x.pth"], "trains its own classifier"),
    (["samples=samples", "reference=digits", "extractor=digits", "labels=none.txt"], "one class number per line"),
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
    assert not Path("results.jsonl").exists()


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
    with pytest.raises(ValueError, match=r"clips are uint8, or float32 .* got torch\.float64 \(1, 9, 3, 12, 14\)"):
        extractor(torch.zeros(1, 9, 3, 12, 14, dtype=torch.float64))
    with pytest.raises(FileNotFoundError, match=r"FVD .* needs i3d_torchscript\.pt"):
        VideoFeatures(resize="inside")


def test_videogpts_i3d_is_read_from_its_own_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = I3D(classes=400).eval()
    torch.save(network.state_dict(), tmp_path / "i3d.pt")
    extractor = VideoFeatures(resize="stretched", weights=tmp_path / "i3d.pt")
    clips = torch.rand(1, 9, 3, 12, 14)
    frames = nn.functional.interpolate(2 * clips[0] - 1, (224, 224), mode="bilinear")
    with torch.no_grad():
        expected = network(frames.movedim(0, 1)[None])[0]
    torch.testing.assert_close(extractor(clips)["features"], expected)
    assert torch.equal(extractor((clips * 255).round() / 255)["features"],
                       extractor((clips * 255).round().byte())["features"])
    with pytest.raises(ValueError, match=r"i3d\.pt is not a TorchScript network"):
        VideoFeatures(resize="inside", weights=tmp_path / "i3d.pt")
    with pytest.raises(ValueError, match="unknown resize 'squashed'"):
        VideoFeatures(resize="squashed")
