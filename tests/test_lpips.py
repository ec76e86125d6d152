from __future__ import annotations

import pytest
import torch

from varzoo.core.checkpoint import load_strictly
from varzoo.nn.lpips import BACKBONES, LPIPS


@pytest.fixture(params=["vgg", "alex"])
def net(request) -> str:
    return request.param


def images_of(batch: int, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size) * 2 - 1


def write_backbone(path, net: str) -> dict[str, torch.Tensor]:
    """A file of torchvision's layout, its classifier cut short. Returns the convolutions by our names."""
    state = {name: tensor for name, tensor in LPIPS(net).state_dict().items() if name.startswith("backbone.")}
    torchvision = {name.replace("backbone.", "features."): tensor for name, tensor in state.items()}
    torch.save(torchvision | {"classifier.6.weight": torch.zeros(2, 2)}, path)
    return state


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.*")
def test_agrees_with_the_lpips_package(net: str) -> None:
    lpips = pytest.importorskip("lpips")
    official = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False).eval()
    ours = LPIPS(net)
    key_map = ours.key_maps()["lpips"]
    load_strictly(ours, key_map.to_ours(official.state_dict()), "the lpips package")
    back = key_map.to_official(ours.state_dict())
    assert back.keys() == official.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in official.state_dict().items())

    a, b = images_of(2, 40), images_of(2, 40)
    expected, layers = official(a, b, retPerLayer=True)
    torch.testing.assert_close(ours(a, b), expected.flatten())
    torch.testing.assert_close(ours.per_layer(a, b), torch.cat(layers, dim=1).flatten(1))


def test_llamagen_layout_survives_the_round_trip(net: str) -> None:
    ours = LPIPS(net)
    key_map = ours.key_maps()["llamagen"]
    official = key_map.to_official(ours.state_dict())
    assert all(name.startswith("perceptual_loss.") for name in official)
    load_strictly(ours, key_map.to_ours(official), "LlamaGen's loss")


def test_second_names_must_hold_the_same_values() -> None:
    model = LPIPS("alex")
    key_map = model.key_maps()["lpips"]
    official = key_map.to_official(model.state_dict())
    official["lins.2.model.1.weight"] = official["lins.2.model.1.weight"] + 1
    with pytest.raises(ValueError, match=r"lins\.2\.model\.1\.weight should equal"):
        key_map.to_ours(official)


def test_is_a_distance_per_image() -> None:
    model = LPIPS("alex")
    with torch.no_grad():
        for head in model.heads:  # as released: weights of the differences are not negative
            head.weight.abs_()
    a, b = images_of(3), images_of(3)
    distance = model(a, b)
    assert distance.shape == (3,) and (distance > 0).all()
    assert torch.equal(model(a, a), torch.zeros(3))
    torch.testing.assert_close(model(b, a), distance)
    torch.testing.assert_close(model(a[1:2], b[1:2]), distance[1:2])


def test_is_frozen_but_passes_gradients() -> None:
    model, a, b = LPIPS("vgg"), images_of(1, 16), images_of(1, 16).requires_grad_()
    model(a, b).sum().backward()
    assert b.grad.any() and all(not parameter.requires_grad for parameter in model.parameters())


def test_mode_makes_no_difference() -> None:
    model, a, b = LPIPS("vgg"), images_of(1), images_of(1)
    assert torch.equal(model.train()(a, b), model.eval()(a, b))


def test_smallest_images(net: str) -> None:
    model, smallest = LPIPS(net), BACKBONES[net].smallest
    assert model(images_of(1, smallest), images_of(1, smallest)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {smallest} x {smallest}"):
        model(images_of(1, smallest - 1), images_of(1, smallest - 1))


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'vgg'"):
        LPIPS("vgg16")


def test_pretrained_reads_an_explicit_backbone_and_the_shipped_heads(net: str, tmp_path) -> None:
    backbone = write_backbone(tmp_path / "mine.pth", net)
    model = LPIPS.pretrained(net, backbone=tmp_path / "mine.pth")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in backbone.items())
    assert all((head.weight >= 0).all() and head.weight.any() for head in model.heads)


def test_pretrained_looks_in_varzoo_weights_then_in_the_hub_cache(tmp_path, monkeypatch) -> None:
    hub = torch.hub.get_dir()
    try:
        torch.hub.set_dir(tmp_path / "hub")
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        monkeypatch.delenv("VARZOO_WEIGHTS", raising=False)
        cached = write_backbone(tmp_path / "hub" / "checkpoints" / BACKBONES["alex"].file, "alex")
        found = LPIPS.pretrained("alex").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in cached.items())

        monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path))
        preferred = write_backbone(tmp_path / BACKBONES["alex"].file, "alex")
        found = LPIPS.pretrained("alex").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in preferred.items())
    finally:
        torch.hub.set_dir(hub)


def test_absent_weights_are_named_with_the_way_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VARZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"(?s)vgg16-397923af\.pth.*VARZOO_WEIGHTS.*perceptual weight to 0"):
        LPIPS.pretrained("vgg")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        LPIPS.pretrained("vgg", backbone=tmp_path / "nowhere.pth")
    write_backbone(tmp_path / BACKBONES["vgg"].file, "vgg")
    with pytest.raises(FileNotFoundError, match=r"heads\.pth"):
        LPIPS.pretrained("vgg", heads=tmp_path / "heads.pth")


def test_a_backbone_of_another_architecture_is_refused(tmp_path) -> None:
    write_backbone(tmp_path / "alex.pth", "alex")
    with pytest.raises(ValueError, match="not a checkpoint of this LPIPS"):
        LPIPS.pretrained("vgg", backbone=tmp_path / "alex.pth")
