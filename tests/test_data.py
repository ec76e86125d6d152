"""Data sets, transforms and batches: pure functions of their keys, and clear about what is wrong with files."""

from __future__ import annotations

import gzip
import hashlib
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from varzoo.core.draws import Draws
from varzoo.data import CenterCrop, Digits, Example, FashionMNIST, ImageFolder, ImageNet, RandomCrop, StepBatchSampler
from varzoo.data.transforms import TenCrop, center_crop, make_transform
from varzoo.tokenizers.base import to_uint8


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "set" / name / "deep").mkdir(parents=True)
        for number in ("0", "1", "deep/2"):
            picture(20 + label, 30, seed=10 * label + len(number)).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


# --- transforms ---

def test_center_crop_of_a_non_square_size_keeps_the_aspect_ratio() -> None:
    gradient = Image.fromarray(np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (40, 1, 3)))  # 40 x 120
    cropped = pixels(center_crop(gradient, (20, 30)))
    assert cropped.shape == (20, 30, 3)
    assert abs(cropped.mean() - 59.5) <= 0.5  # the centre
    assert abs(int(cropped[0, -1, 0]) - int(cropped[0, 0, 0]) - 58) <= 2  # 30 columns of 2 source columns each


def test_ten_crop_views_are_the_corners_the_centre_and_their_mirrors() -> None:
    original, transform = picture(64, 80), TenCrop(40, ranges=(1.1,))
    larger = pixels(center_crop(original, (44, 44)))
    views = [pixels(transform.view(original, number)) for number in range(transform.views)]
    corners = [larger[:40, :40], larger[:40, 4:], larger[4:, :40], larger[4:, 4:], larger[2:42, 2:42]]
    for number, corner in enumerate(corners):
        assert (views[number] == corner).all()
    mirrored = larger[:, ::-1]
    assert (views[5] == mirrored[:40, :40]).all()
    assert (views[9] == mirrored[2:42, 2:42]).all()


def test_both_ranges_of_the_ten_crop_are_drawn_equally_often() -> None:
    transform = make_transform("ten_crop", 16)
    drawn = Draws(0, tuple(range(2000))).integers("view", transform.views)
    counts = np.bincount(drawn.numpy(), minlength=20)
    assert transform.views == 20
    assert counts.min() > 60 and abs(counts[:10].sum() - 1000) < 100


def test_random_crop_covers_its_range_and_is_a_function_of_its_draws() -> None:
    original, transform = picture(90, 70), RandomCrop((24, 32))
    first, again = (transform(original, Draws(3, (5,)).keyed(iteration=2)) for _ in range(2))
    assert first.size == (32, 24) and (pixels(first) == pixels(again)).all()
    crops = {pixels(transform(original, Draws(3, (5,)).keyed(iteration=step))).tobytes() for step in range(20)}
    assert len(crops) > 15


def test_random_crop_of_the_whole_is_the_center_crop() -> None:
    original, transform = picture(40, 40), RandomCrop(20, fractions=(1.0, 1.0), flip=False)
    assert (pixels(transform(original, Draws(0, (0,)))) == pixels(center_crop(original, (20, 20)))).all()


def test_unknown_augmentation_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="ten_crop"):
        make_transform("tencrop", 16)
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        make_transform(CenterCrop(8), 16)
    with pytest.raises(ValueError, match="fractions"):
        RandomCrop(16, fractions=(0.0, 1.0))
    with pytest.raises(ValueError, match="image_size"):
        CenterCrop(0)


# --- digits ---

def test_digits_split_is_fixed_and_complete() -> None:
    train, heldout = Digits(split="train"), Digits(split="heldout")
    assert (len(train), len(heldout)) == (1297, 500)
    assert heldout.labels.bincount().min() >= 48
    together = np.concatenate([train._images, heldout._images]).reshape(-1, 64)
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert (together[np.lexsort(together.T)] == original[np.lexsort(original.T)]).all()
    digest = hashlib.sha256(heldout._images.tobytes() + heldout.labels.numpy().tobytes()).hexdigest()
    assert digest.startswith(HELDOUT_DIGITS)


HELDOUT_DIGITS = "44a2bfa94df22fda"


def test_items_have_the_promised_form_and_range() -> None:
    item = Digits(image_size=(16, 24))[7]
    assert item["image"].shape == (3, 16, 24) and item["image"].dtype == torch.float32
    assert item["label"].dtype == torch.int64 and int(item["index"]) == 7
    digits = Digits()
    everything = torch.stack([digits[index]["image"] for index in range(100)])
    assert everything.min() == -1 and everything.max() == 1
    assert (everything[:, 0] == everything[:, 2]).all()


def test_floats_go_back_to_the_same_uint8() -> None:
    digits = Digits(image_size=8)
    assert (to_uint8(digits[3]["image"])[0].numpy() == pixels(digits.picture(3))[..., 0]).all()


def test_unknown_split_and_index() -> None:
    with pytest.raises(ValueError, match="heldout"):
        Digits(split="held-out")
    with pytest.raises(IndexError, match="1297"):
        Digits()[1297]


def test_an_item_is_a_function_of_index_and_iteration_in_any_worker() -> None:
    dataset = Digits(augmentation="random_crop", seed=4)
    keys = [[Example(index, step) for index in range(step, step + 4)] for step in range(6)]
    here = list(DataLoader(dataset, batch_sampler=keys))
    elsewhere = list(DataLoader(dataset, batch_sampler=keys[::-1], num_workers=2))[::-1]
    for one, other in zip(here, elsewhere):
        assert (one["image"] == other["image"]).all() and (one["index"] == other["index"]).all()
    steps = {dataset[Example(0, step)]["image"].numpy().tobytes() for step in range(20)}
    assert len(steps) > 5


def test_flip_happens_half_of_the_time_and_only_mirrors() -> None:
    dataset = Digits(augmentation="flip")
    plain, mirrored = dataset.views(0)
    assert (plain.flip(-1) == mirrored).all() and not (plain == mirrored).all()
    plains = sum(bool((dataset[Example(0, step)]["image"] == plain).all()) for step in range(400))
    assert 150 < plains < 250


# --- Fashion-MNIST ---

def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (6, 28, 28), dtype=np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([9, 0, 1, 2, 3, 4], np.uint8))
    return tmp_path


def test_fashion_mnist_reads_idx_files(fashion: Path) -> None:
    dataset = FashionMNIST(split="heldout", root=fashion)
    assert len(dataset) == 6 and dataset.labels.tolist() == [9, 0, 1, 2, 3, 4]
    assert dataset.num_classes == 10 and dataset.class_names[9] == "ankle boot"
    rng = np.random.default_rng(0)
    assert (pixels(dataset.picture(0))[..., 0] == rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)[0]).all()
    assert dataset[0]["image"].shape == (3, 32, 32)


def test_missing_fashion_mnist_names_the_ways_out(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*root=FOLDER"):
        FashionMNIST(split="train", root=fashion)
    monkeypatch.setattr(FashionMNIST, "DEBIAN", fashion / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        FashionMNIST(split="heldout")
    monkeypatch.setattr(FashionMNIST, "DEBIAN", fashion)
    assert len(FashionMNIST(split="heldout")) == 6


def test_truncated_idx_file_is_refused(fashion: Path) -> None:
    path = fashion / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"t10k-images.*truncated"):
        FashionMNIST(split="heldout", root=fashion)


# --- folders ---

def test_image_folder(folder: Path) -> None:
    dataset = ImageFolder(root=folder, image_size=16)
    assert dataset.class_names == ("ant", "bee", "cat") and len(dataset) == 9
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset[4]["image"].shape == (3, 16, 16) and dataset.describe()["name"] == "set"


def test_empty_folders_are_one_clear_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(root=tmp_path / "nowhere", image_size=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(root=tmp_path / "empty", image_size=16)
    (folder / "dog").mkdir()
    with pytest.raises(ValueError, match=r"1 of 4 class folders: dog\."):
        ImageFolder(root=folder, image_size=16)


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"not an image"])
def test_corrupt_image_is_named_or_skipped(folder: Path, damage, caplog: pytest.LogCaptureFixture) -> None:
    bad = folder / "bee" / "1.png"
    bad.write_bytes(damage(bad.read_bytes()))
    dataset = ImageFolder(root=folder, image_size=16)
    assert dataset[3]["label"] == 1
    with pytest.raises(ValueError, match=r"1\.png.*on_corrupt=skip"):
        dataset[4]
    skipping = ImageFolder(root=folder, image_size=16, on_corrupt="skip")
    assert len(skipping) == 8 and bad not in skipping.files and str(bad) in caplog.text
    assert (skipping[4]["image"] == dataset[5]["image"]).all()


def test_skipping_does_not_leave_a_class_empty(folder: Path) -> None:
    for path in (folder / "cat").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="cat"):
        ImageFolder(root=folder, image_size=16, on_corrupt="skip")
    with pytest.raises(ValueError, match="raise, skip"):
        ImageFolder(root=folder, image_size=16, on_corrupt="ignore")


def test_imagenet_classes_must_be_the_wnids(tmp_path: Path) -> None:
    for number, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names()):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        if number < 3:
            picture(20, 20, number).save(tmp_path / "val" / wnid / "x.JPEG")
        else:
            (tmp_path / "val" / wnid / "x.JPEG").touch()
    dataset = ImageNet(root=tmp_path, split="val", image_size=16)
    assert len(dataset) == 1000 and dataset.labels.tolist() == list(range(1000))
    assert dataset.class_names[:2] == ("tench", "goldfish") and dataset[1]["image"].shape == (3, 16, 16)
    (tmp_path / "val" / "n01440764").rename(tmp_path / "val" / "tench")
    with pytest.raises(ValueError, match=r"1000 class folders.*tench; missing: n01440764"):
        ImageNet(root=tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="train"):
        ImageNet(root=tmp_path, split="train")


# --- batches ---

def test_every_epoch_sees_every_image_once_and_in_another_order() -> None:
    sampler = StepBatchSampler(length=10, batch_size=4, seed=0)
    batches = list(islice(sampler, 5))
    seen = [example.index for batch in batches for example in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert all(example.iteration == step for step, batch in enumerate(batches) for example in batch)


def test_batches_are_a_function_of_the_step() -> None:
    batches = list(islice(StepBatchSampler(length=7, batch_size=16, seed=3), 6))  # more than two epochs per batch
    assert list(islice(StepBatchSampler(length=7, batch_size=16, seed=3, start_step=4), 2)) == batches[4:]
    backwards = StepBatchSampler(length=7, batch_size=16, seed=3)
    assert [backwards.batch_at(step) for step in reversed(range(6))] == batches[::-1]
    assert backwards.batch_at(0) != StepBatchSampler(length=7, batch_size=16, seed=4).batch_at(0)


def test_sharded_batches_are_slices_of_the_whole() -> None:
    whole = StepBatchSampler(length=23, batch_size=12, seed=1)
    shards = [StepBatchSampler(length=23, batch_size=12, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for step in range(8):
        assert [example for shard in shards for example in shard.batch_at(step)] == whole.batch_at(step)


def test_unshuffled_batches_are_in_order() -> None:
    sampler = StepBatchSampler(length=5, batch_size=4, seed=0, shuffle=False)
    assert [example.index for step in range(2) for example in sampler.batch_at(step)] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        StepBatchSampler(length=10, batch_size=8, seed=0, world_size=3)
    with pytest.raises(ValueError, match="rank"):
        StepBatchSampler(length=10, batch_size=8, seed=0, rank=2, world_size=2)
