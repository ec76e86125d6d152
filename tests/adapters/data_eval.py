"""Adapters of the golden cases about data and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.golden_case import Case
from varzoo.data.transforms import center_crop
from varzoo.eval.inception_score import InceptionScore, consecutive_splits, equal_splits, shuffled_splits
from varzoo.eval.moments import Moments, frechet_distance
from varzoo.tokenizers.base import to_uint8


def _cropped(image: Tensor, size: int) -> Tensor:
    return torch.from_numpy(np.array(center_crop(Image.fromarray(image.numpy()), (size, size))))


def mar_center_crop(case: Case) -> dict[str, Any]:
    numbers = [name.removeprefix("image") for name in case.inputs if name.startswith("image")]
    return {f"crop{n}": _cropped(case.inputs[f"image{n}"], int(case.inputs[f"size{n}"])) for n in numbers}


def eval_center_crop(case: Case) -> dict[str, Any]:
    return {f"y{n}": _cropped(case.inputs[f"x{n}"], size) for n, (_, _, size) in enumerate(case.config["sizes"])}


def uint8_rules(case: Case) -> dict[str, Any]:
    rules = {"mar": "round", "llamagen": "half_up", "trunc": "truncate"}
    return {name: to_uint8(case.inputs["x"], rule) for name, rule in rules.items()}


def fid(case: Case) -> dict[str, Any]:
    gaussians = {}
    for name, features in case.inputs.items():
        moments = Moments(dim=features.shape[1])
        for rows in features.split(97):  # streamed, in batches that do not divide the set
            moments.update(rows)
        gaussians[name] = moments.gaussian()
    distance = frechet_distance(gaussians["ref"], gaussians["sample"])
    few = frechet_distance(gaussians["few_ref"], gaussians["few_sample"])
    return {
        **{f"mu_{name}": gaussian.mean for name, gaussian in gaussians.items()},
        **{f"sigma_{name}": gaussian.covariance for name, gaussian in gaussians.items()},
        "fid_adm": distance, "fid_torch_fidelity": distance, "few_fid_adm": few, "few_fid_torch_fidelity": few,
    }


def inception_score(case: Case) -> dict[str, Any]:
    logits = case.inputs["sample"] @ case.inputs["W"]
    count, config = len(logits), case.config

    def score(assignment: Tensor) -> tuple[float, float]:
        sums = InceptionScore(classes=logits.shape[1], assignment=assignment)
        for rows in logits.split(97):
            sums.update(rows)
        return sums.result()

    shuffled = score(shuffled_splits(count, splits=config["tf_splits"], seed=config["rng_seed"]))
    ordered = score(equal_splits(count, splits=config["tf_splits"]))
    return {
        "is_adm": score(consecutive_splits(count, size=config["adm_split_size"]))[0],
        "is_mean": shuffled[0], "is_std": shuffled[1],
        "is_mean_noshuffle": ordered[0], "is_std_noshuffle": ordered[1],
    }


KINDS = {
    "mar/center_crop": mar_center_crop,
    "eval/center_crop": eval_center_crop,
    "eval/to_uint8": uint8_rules,
    "eval/fid": fid,
    "eval/inception_score": inception_score,
}
