"""Speculative sampling of continuous tokens: acceptance by densities, and the loop over a draft and a target."""

from varzoo.samplers.continuous.acceptance import Acceptance
from varzoo.samplers.continuous.sampler import ContinuousSpeculative, PrefixSpeculative

__all__ = ["Acceptance", "ContinuousSpeculative", "PrefixSpeculative"]
