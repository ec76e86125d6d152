"""How to draw: loops over a decoding."""

from varzoo.samplers.autoregressive import Autoregressive
from varzoo.samplers.base import Counts, Progress, Sampled, Sampler
from varzoo.samplers.speculative import Speculative

__all__ = ["Autoregressive", "Counts", "Progress", "Sampled", "Sampler", "Speculative"]
