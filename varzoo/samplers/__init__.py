"""How to draw: loops over a decoding."""

from varzoo.samplers.autoregressive import Autoregressive
from varzoo.samplers.base import Counts, Progress, Sampled, Sampler

__all__ = ["Autoregressive", "Counts", "Progress", "Sampled", "Sampler"]
