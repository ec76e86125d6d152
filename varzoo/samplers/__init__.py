"""How to draw: loops over a decoding."""

from varzoo.samplers.autoregressive import Autoregressive
from varzoo.samplers.base import Counts, Progress, Sampled, Sampler
from varzoo.samplers.continuous import ContinuousSpeculative, PrefixSpeculative
from varzoo.samplers.speculative import Speculative

__all__ = ["Autoregressive", "ContinuousSpeculative", "Counts", "PrefixSpeculative", "Progress", "Sampled", "Sampler",
           "Speculative"]
