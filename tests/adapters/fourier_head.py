"""Golden cases of nate-gillman/fourier-head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.keymap import KeyMap, Rename
from varzoo.nn.fourier_head import FourierHead, autocorrelation, cumulative, density, quantile

NAMES = KeyMap([Rename("fc_extract_autocorrelation_params.{p}", "coefficients.{p}")])


def loaded_head(case: Case) -> FourierHead:
    config = case.config
    head = FourierHead(config["dim_input"], config["dim_output"], frequencies=config["num_frequencies"],
                       penalty_weight=config["regularizion_gamma"], floor=config["const_inverse_softmax"],
                       weight_divisor=100.0, bias_divisor=100.0)
    load_strictly(head, NAMES.to_ours(case.state_dict), "the case")
    return head


def head(case: Case) -> dict[str, Any]:
    model, x, targets = loaded_head(case), case.inputs["x"], case.inputs["targets"]
    logits, penalty = model(x), model.penalty(x)
    entropy = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    (entropy + penalty).backward()
    alpha = model.alpha(x).flatten(0, -2).detach()
    coefficients = autocorrelation(alpha)
    points = torch.linspace(-1, 1, case.outputs["pdf_points"].numel())
    return {"logits": logits, "pmf": logits.softmax(dim=-1), "coeff_real": coefficients.real,
            "coeff_imag": coefficients.imag, "pdf_points": points, "pdf": density(alpha, points.expand(len(alpha), -1)),
            "ce": entropy, "loss_regularization": penalty, "grad_weight": model.coefficients.weight.grad,
            "grad_bias": model.coefficients.bias.grad}


@torch.no_grad()
def continuous(case: Case) -> dict[str, Any]:
    alpha = loaded_head(case).alpha(case.inputs["x"]).flatten(0, -2)
    z = case.inputs["z"]
    return {"pdf": density(alpha, z), "cdf": cumulative(alpha, z), "sample": quantile(alpha, case.inputs["u"])}


KINDS = {"fourier_head/head": head, "fourier_head/continuous": continuous}
