"""Inception weights for tests: random, in the shape of the published file, so that the network is real and no number is
a FID."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_random_inception(path: Path) -> Path:
    """Kernels are scaled so that activations neither vanish nor grow."""
    build = FeatureExtractorInceptionV3.load_state_dict
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    try:
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    finally:
        FeatureExtractorInceptionV3.load_state_dict = build
    generator = torch.Generator().manual_seed(0)
    state = {name: _scaled(value, generator) for name, value in network.state_dict().items()}
    state["fc.weight"] *= 30  # images far apart in class, for inception scores well above 1
    torch.save(state, path)
    return path


def _scaled(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return value
    return torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
