"""Files of samples belong to one run, and are read as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.images import toy_images
from varzoo.eval.readers import SampleReader
from varzoo.eval.writers import NpzFile, PNGFolder, image_grid


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
