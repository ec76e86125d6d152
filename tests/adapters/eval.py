"""Adapters of the golden cases about measuring networks, distances and closeness."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.eval.i3d import I3D
from varzoo.eval.inception import InceptionFeatures, resize_like_tf1
from varzoo.eval.kernel_distance import kernel_distance
from varzoo.eval.manifold import neighbour_radii, precision_recall
from varzoo.eval.moments import Gaussian, Moments, frechet_distance
from varzoo.eval.similarity import psnr, ssim
from varzoo.eval.video import resize_short_side, resize_stretched


def network_state(case: Case, kernel_axes: int) -> dict[str, Tensor]:
    """The filled weights with amplified kernels, and fresh statistics of batch norm."""
    gain = case.config["conv_gain"]
    state = {name: value * gain if value.ndim == kernel_axes else value for name, value in case.state_dict.items()}
    for name, shape, dtype in case.meta["kept"]:
        make = torch.ones if name.endswith("running_var") else torch.zeros
        state[name] = make(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
    return state


@torch.no_grad()
def inception(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network_state(case, 4), Path(folder) / "weights.pth")
        extractor = InceptionFeatures(weights=Path(folder) / "weights.pth")
    taps = {name: layer.mean(dim=(2, 3)) for name, layer in extractor.activations(case.inputs["x"]).items()}
    output = extractor(case.inputs["x"])
    return {"f64": taps["MaxPool_1"], "f192": taps["MaxPool_2"], "f768": taps["Mixed_6e"], "f2048": output["features"],
            "logits_unbiased": output["logits"], "spatial": output["spatial"]}


@torch.no_grad()
def i3d(case: Case) -> dict[str, Any]:
    network = I3D(classes=case.config["num_classes"]).eval()
    load_strictly(network, network_state(case, 5), "golden case")
    clips = resize_stretched(case.inputs["v"].permute(0, 4, 1, 2, 3).float(), 224)
    logits, pooled = network(2 * clips / 255 - 1)
    return {"logits": logits, "pooled": pooled}


def resize(case: Case) -> dict[str, Any]:
    return {f"y{n}": resize_like_tf1(case.inputs[f"x{n}"].float(), (height, width))
            for n, (_, _, height, width) in enumerate(case.config["sizes"])}


def gaussian(features: Tensor, biased: bool = False) -> Gaussian:
    moments = Moments(dim=features.shape[1])
    for rows in features.split(33):
        moments.update(rows)
    return moments.gaussian(biased=biased)


def fvd(case: Case) -> dict[str, Any]:
    samples, references = case.inputs["sample"], case.inputs["ref"]
    unbiased = frechet_distance(gaussian(samples), gaussian(references))
    own = gaussian(samples, biased=True)
    return {"fvd_styleganv": unbiased, "fvd_videogpt": unbiased,
            "fvd_nar": frechet_distance(own, gaussian(references, biased=True)),
            "nar_mean": own.mean, "nar_cov": own.covariance}


def fvd_from_features(case: Case) -> dict[str, Any]:
    fake, real = case.inputs["fake"], case.inputs["real"]
    return {"fvd_nar": frechet_distance(gaussian(fake, biased=True), gaussian(real, biased=True)),
            "fvd_nbp": frechet_distance(gaussian(fake), gaussian(real))}


def fvd_preprocess(case: Case) -> dict[str, Any]:
    clip = case.inputs["clip"]
    return {"up": 2 * resize_short_side(clip, case.config["resolution_up"]) - 1,
            "down": resize_short_side(clip, case.config["resolution_down"])}


def kid(case: Case) -> dict[str, Any]:
    indices = zip(case.inputs["idx_sample"], case.inputs["idx_ref"])
    kernel = {name: case.config[name] for name in ("degree", "gamma", "coef0")}
    mean, std = kernel_distance(case.inputs["sample"], case.inputs["ref"], indices, **kernel)
    return {"kid_mean": mean, "kid_std": std}


def manifolds(case: Case) -> dict[str, Any]:
    k, samples, references = case.config["k"], case.inputs["sample"], case.inputs["ref"]
    radii = {f"radii_{name}": neighbour_radii(points, k=k, half=True)[:, None] for name, points in case.inputs.items()}
    adm, plain = (precision_recall(samples, references, k=k, half=half) for half in (True, False))
    return {**radii, "precision_adm": adm[0], "recall_adm": adm[1], "precision_f32": plain[0], "recall_f32": plain[1]}


def closeness(case: Case) -> dict[str, Any]:
    original = case.inputs["gt"].permute(2, 0, 1)[None]
    decoded = case.inputs["rec_u8"].permute(2, 0, 1)[None] / 255
    return {"psnr": psnr(decoded, original)[0], "ssim_llamagen": ssim(decoded, original, data_range=2.0)[0],
            "ssim_1": ssim(decoded, original)[0], "ssim_gaussian": ssim(decoded, original, window="gaussian")[0]}


KINDS = {
    "eval/inception_v3": inception,
    "eval/i3d": i3d,
    "eval/resize_tf1": resize,
    "eval/fvd_frechet": fvd,
    "nar/fvd_from_features": fvd_from_features,
    "nbp/fvd_preprocess": fvd_preprocess,
    "eval/kid": kid,
    "eval/precision_recall": manifolds,
    "eval/psnr_ssim": closeness,
}
