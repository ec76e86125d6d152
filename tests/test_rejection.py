from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet101

from tests.test_rqvae import small_generator, small_tokenizer
from varzoo.eval.features import FeatureExtractor, ResNetFeatures
from varzoo.loading import Model, build, compose_config
from varzoo.rejection import Rejection
from varzoo.samplers import Autoregressive
from varzoo.sampling import Request, draw


class Brightness(FeatureExtractor):
    """Sees class k where the k-th of 7 pixels is bright."""

    name, metric, dim, classes = "brightness", "fd_brightness", 7, 7

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images[:, 0].flatten(1)[:, :7].float() / 10
        return {"features": pixels, "logits": pixels}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tokenizer=small_tokenizer().eval(), generator=small_generator(), sampler=Autoregressive())


def images_of(model: Model, labels: list[int], rejection: Rejection | None = None, **settings) -> Tensor:
    batches = draw(model, Request(labels=labels), seed=3, progress=False, rejection=rejection,
                   **{"batch_size": 8} | settings)
    return torch.cat([samples.images for samples in batches])


def test_the_best_of_what_would_be_drawn_without_it_is_kept(model: Model) -> None:
    rejection = Rejection(classifier=Brightness(), keep=0.25)
    labels = [1, 1, 4, 5, 5]
    kept = images_of(model, labels, rejection)
    everything = images_of(model, [label for label in labels for _ in range(4)]).unflatten(0, (5, 4))
    for label, image, candidates in zip(labels, kept, everything):
        scores = [candidate[0].flatten()[:7].float().div(10).log_softmax(0)[label].item() for candidate in candidates]
        assert len(set(scores)) > 1 and torch.equal(image, candidates[scores.index(max(scores))])


def test_an_image_depends_neither_on_batch_nor_on_companions(model: Model) -> None:
    rejection, labels = Rejection(classifier=Brightness(), keep=1 / 3), [0, 2, 2, 6]
    whole = images_of(model, labels, rejection)
    assert torch.equal(images_of(model, labels, rejection, batch_size=2), whole)  # less than the candidates of one
    assert torch.equal(images_of(model, labels, rejection, batch_size=100), whole)
    assert torch.equal(images_of(model, labels, rejection, indices=[3, 1]), whole[[3, 1]])
    assert torch.equal(images_of(model, labels, Rejection(classifier=Brightness(), keep=1.0)), images_of(model, labels))


def test_the_batch_says_which_images_they_are(model: Model) -> None:
    rejection = Rejection(classifier=Brightness(), keep=0.5)
    batches = list(draw(model, Request(labels=[3, 4, 5]), seed=0, batch_size=4, rejection=rejection, progress=False))
    assert [samples.labels.tolist() for samples in batches] == [[3, 4], [5]]
    assert [samples.indices.tolist() for samples in batches] == [[0, 1], [2]]


def test_bad_input_is_refused(model: Model, tmp_path: Path) -> None:
    for keep in (0.0, -0.1, 1.5, 0.3):
        with pytest.raises(ValueError, match=f"must be one over a whole number, such as 0.05, got {keep:g}"):
            Rejection(classifier=Brightness(), keep=keep)
    rejection = Rejection(classifier=Brightness(), keep=0.5)
    with pytest.raises(ValueError, match="it needs labels, and this model has none"):
        next(draw(model, Request(count=2), seed=0, batch_size=2, rejection=rejection))
    with pytest.raises(ValueError, match="brightness knows classes 0 to 6, but class 7 was asked for"):
        next(draw(model, Request(labels=[7]), seed=0, batch_size=2, rejection=rejection))
    with pytest.raises(ValueError, match="leave one of the two out"):
        next(draw(model, Request(labels=[1]), seed=0, batch_size=2, rejection=rejection, previews=tmp_path))
    with pytest.raises(ValueError, match=r"the ResNet-101 needs its weights: .* rejection\.classifier\.weights=FILE"):
        build(compose_config("sample", ["rejection=resnet101"]).rejection)


def test_a_resnet_of_a_file(tmp_path: Path) -> None:
    network = resnet101().eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    found = ResNetFeatures(weights=tmp_path / "resnet.pth")(images)
    normalised = (images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], network(normalised), atol=1e-4, rtol=1e-4)
    assert found["features"].shape == (1, 2048)
