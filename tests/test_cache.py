"""Token caches: complete or unfinished, never half; resumed after a kill; of one tokenizer only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varzoo.core.draws import Draws
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.data import CachedTokens, Digits, Example, build_cache
from varzoo.data.datasets import LabelledImages
from varzoo.tokenizers.base import Tokenizer
from varzoo.tokenizers.kl import KLTokenizer


class Grey(Tokenizer):
    """Ids: the mean grey level of 4 x 4 patches in `size` steps; with `continuous`, mean and deviation instead."""

    image_size = (16, 16)

    def __init__(self, *, size: int = 300, continuous: bool = False, pause: float = 0.0) -> None:
        super().__init__()
        kind, size = ("continuous", 1) if continuous else ("discrete", size)
        self.spec = TokenSpec(kind=kind, shape=(4, 4), size=size)
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.calls, self.pause = 0, pause

    def compress(self, images: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.pause)
        patches = images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).reshape(len(images), 16, 16) * self.gain
        if self.spec.kind == "continuous":
            return torch.stack([patches.mean(-1), patches.std(-1)], -1)
        return ((patches.mean(-1) + 1) / 2 * (self.spec.size - 1)).long()

    def tokens(self, compressed: Tensor, draws: Draws | None = None) -> Tensor:
        return compressed

    def decode(self, tokens: Tensor) -> Tensor:
        raise AssertionError("a cache decodes nothing")

    def reconstruction_losses(self, images: Tensor, draws: Draws) -> tuple[Tensor, Losses]:
        raise AssertionError("a cache trains nothing")

    def key_maps(self) -> dict[str, KeyMap]:
        return {}


class Few(Digits):
    """The first 50 digits."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.labels = self.labels[:50]


def make(folder: Path, *, tokenizer: Tokenizer | None = None, dataset: LabelledImages | None = None, **options) -> Path:
    return build_cache(folder, tokenizer=tokenizer or Grey(), dataset=dataset or Few(augmentation="flip"), batch_size=8,
                       progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("augmentation", ["none", "flip", "ten_crop"])
def test_cached_training_sees_what_uncached_training_sees(tmp_path: Path, augmentation: str) -> None:
    tokenizer, dataset = Grey(), Few(augmentation=augmentation, seed=5)
    folder = make(tmp_path / "c", tokenizer=tokenizer, dataset=dataset)
    cached = CachedTokens(folder=folder, tokenizer=tokenizer, seed=5)
    assert (len(cached), cached.views, cached.num_classes) == (50, dataset.transform.views, 10)
    assert cached.spec == tokenizer.spec
    for key in (3, Example(3, 1), Example(3, 2), Example(49, 7)):
        item, original = cached[key], dataset[key]
        assert (item["compressed"] == tokenizer.compress(original["image"][None])[0]).all()
        assert item["label"] == original["label"] and item["index"] == original["index"]
    assert item["compressed"].dtype == torch.int64


def test_moments_are_cached_as_float32(tmp_path: Path) -> None:
    tokenizer, dataset = Grey(continuous=True), Few()
    cached = CachedTokens(folder=make(tmp_path / "c", tokenizer=tokenizer, dataset=dataset), tokenizer=tokenizer)
    assert cached[9]["compressed"].dtype == torch.float32 and cached[9]["compressed"].shape == (16, 2)
    torch.testing.assert_close(cached[9]["compressed"], tokenizer.compress(dataset[9]["image"][None])[0].detach())


@pytest.mark.parametrize(("size", "dtype"), [(128, "uint8"), (300, "uint16"), (70000, "uint32")])
def test_ids_take_no_more_room_than_they_need(tmp_path: Path, size: int, dtype: str) -> None:
    cached = CachedTokens(folder=make(tmp_path / "c", tokenizer=Grey(size=size)), tokenizer=Grey(size=size))
    assert cached.manifest["dtype"] == dtype


def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    make(tmp_path / "one")
    for rank in (1, 2, 0):
        assert not (tmp_path / "three").exists()
        make(tmp_path / "three", rank=rank, world_size=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert not list(tmp_path.glob("*.partial"))


def test_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    script = (f"from tests.test_cache import Grey, make; from pathlib import Path\n"
              f"make(Path({str(tmp_path / 'c')!r}), tokenizer=Grey(pause=0.15))")
    log = tmp_path / "c.partial" / "finished-0.log"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    try:
        while not (log.exists() and log.read_text().count("]") >= 2):
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "c").exists()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey())
    done = log.read_text().count("]")
    tokenizer = Grey()
    make(tmp_path / "c", tokenizer=tokenizer)
    assert tokenizer.calls == 2 * (7 - done) < 14
    make(tmp_path / "whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_complete_cache_is_not_built_again(tmp_path: Path) -> None:
    make(tmp_path / "c")
    tokenizer = Grey()
    make(tmp_path / "c", tokenizer=tokenizer)
    assert tokenizer.calls == 0


def test_damaged_caches_are_refused(tmp_path: Path) -> None:
    manifest, ids = tmp_path / "c" / "manifest.json", tmp_path / "c" / "compressed.npy"
    make(tmp_path / "c")
    whole, stored = manifest.read_text(), ids.read_bytes()
    for text, message in (
            (whole[:-9], r"manifest\.json is damaged"),
            (json.dumps(json.loads(whole) | {"format": 0}), "has format 0, this version reads"),
            (json.dumps(json.loads(whole) | {"dtype": "uint8"}), "holds uint16 .*, its manifest says uint8")):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            CachedTokens(folder=tmp_path / "c", tokenizer=Grey())
    manifest.write_text(whole)
    ids.write_bytes(stored[:-100])
    with pytest.raises(ValueError, match=r"compressed\.npy is missing or truncated"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey())
    ids.write_bytes(stored)
    with pytest.raises(IndexError, match="there is no image 10000"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey())[10000]


def test_another_tokenizers_cache_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "c")
    own = json.loads((tmp_path / "c" / "manifest.json").read_text())["tokenizer"]
    other = Grey()
    nn.init.constant_(other.gain, 0.5)
    with pytest.raises(ValueError, match=f"another tokenizer: Grey {own['hash']}, not Grey (?!{own['hash']})"):
        CachedTokens(folder=tmp_path / "c", tokenizer=other)
    with pytest.raises(ValueError, match="another tokenizer"):
        make(tmp_path / "c", tokenizer=other)
    with pytest.raises(ValueError, match=r"300 codes, but the tokenizer makes .* 128 codes"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey(size=128))
    before = contents(tmp_path / "c")
    make(tmp_path / "c", tokenizer=other, rebuild=True)
    assert contents(tmp_path / "c") != before and other.calls == 14


def test_another_data_sets_cache_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c")
    with pytest.raises(ValueError, match="views is 2, expected 1"):
        make(tmp_path / "c", dataset=Few())
    with pytest.raises(ValueError, match=r"takes images of \(16, 16\).*gives \(16, 24\)"):
        make(tmp_path / "d", dataset=Few(image_size=(16, 24)))


def test_unfinished_cache_of_another_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c", rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"c\.partial is another cache.*rebuild=true"):
        make(tmp_path / "c", dataset=Few(augmentation="flip", split="heldout"), rank=1, world_size=2)
    tokenizer = Grey()
    make(tmp_path / "c", tokenizer=tokenizer, dataset=Few(split="heldout"), rebuild=True)
    assert tokenizer.calls == 7 and (tmp_path / "c").exists()


def test_torn_log_line_counts_for_nothing(tmp_path: Path) -> None:
    make(tmp_path / "c", rank=0, world_size=2)  # blocks 0, 2, 4, 6
    with open(tmp_path / "c.partial" / "finished-0.log", "a") as log:
        log.write("\n[1")
    tokenizer = Grey()
    make(tmp_path / "c", tokenizer=tokenizer)
    assert tokenizer.calls == 2 * 3 and (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["compressed.npy", "labels.npy"])
def test_truncated_array_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "c") / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{name}.*truncated"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey())


def test_missing_cache_and_uncachable_transform(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="build it first"):
        CachedTokens(folder=tmp_path / "c", tokenizer=Grey())
    with pytest.raises(ValueError, match="draws afresh"):
        make(tmp_path / "c", dataset=Few(augmentation="random_crop"))
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_codebook_are_refused(tmp_path: Path) -> None:
    class Broken(Grey):
        def compress(self, images: Tensor) -> Tensor:
            return super().compress(images) + self.spec.size

    with pytest.raises(ValueError, match="codebook of 300"):
        make(tmp_path / "c", tokenizer=Broken())


def small_kl() -> KLTokenizer:
    return KLTokenizer(image_size=16, width=32, multipliers=[1, 1], blocks_per_level=1, attention_levels=[1],
                       latent_channels=2, patch_size=1, scale=0.5, shift=0.0, kl_weight=1e-6).eval()


def test_a_tokenizer_at_another_size_has_the_same_weights() -> None:
    tokenizer = small_kl()
    other = tokenizer.at_size((8, 12))
    assert other.spec.shape == (4, 6) and other.image_size == (8, 12) and tokenizer.spec.shape == (8, 8)
    assert all(ours is theirs for ours, theirs in zip(other.parameters(), tokenizer.parameters()))
    assert other.decode(other.encode(torch.zeros(1, 3, 8, 12))).shape == (1, 3, 8, 12)
    with pytest.raises(ValueError, match="multiples of the tokenizer's downsampling factor 2; got 9"):
        tokenizer.at_size(9)


def test_copies_are_the_same_view_at_another_size(tmp_path: Path) -> None:
    tokenizer, dataset = small_kl(), Few(augmentation="flip", seed=5)
    folder = make(tmp_path / "c", tokenizer=tokenizer, dataset=dataset, copies={"pivots": [8, 8]})
    cached = CachedTokens(folder=folder, tokenizer=tokenizer, seed=5)
    for key in (Example(3, 0), Example(3, 1), Example(41, 2)):
        image = dataset[key]["image"][None]
        small = F.interpolate(image, (8, 8), mode="bicubic", align_corners=False, antialias=False)
        item = cached[key]
        with torch.no_grad():
            expected = tokenizer.at_size(8).compress(small)[0]
            assert torch.allclose(item["compressed"], tokenizer.compress(image)[0], atol=1e-5)
        assert item["copies"]["pivots"].shape == (16, 4)
        assert torch.allclose(item["copies"]["pivots"], expected, atol=1e-5)
    assert make(folder, tokenizer=tokenizer, dataset=dataset) == folder  # who asks for no copies may have some
    with pytest.raises(ValueError, match=r"another cache: copies is \{'pivots': \[8, 8\]\}, expected"):
        make(folder, tokenizer=tokenizer, dataset=dataset, copies={"pivots": [4, 4]})


def test_copies_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain")
    assert "copies" not in CachedTokens(folder=plain, tokenizer=Grey())[0]
    with pytest.raises(ValueError, match=r"Grey takes images of \(16, 16\) alone, not of \[8, 8\]"):
        make(plain, copies={"pivots": [8, 8]})
    tokenizer = small_kl()
    folder = make(tmp_path / "without", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="another cache: copies is None, expected"):
        make(folder, tokenizer=tokenizer, copies={"pivots": [8, 8]})
