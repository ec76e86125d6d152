"""Speculative sampling of discrete tokens: drafts, verification, and the loop over both."""

from varzoo.samplers.speculative.drafts import Jacobi, ModelDraft
from varzoo.samplers.speculative.models import Eagle, Smaller
from varzoo.samplers.speculative.policies import Additive, Exact, Grouped, KSequential, Lantern, Multiplicative
from varzoo.samplers.speculative.sampler import Speculative
from varzoo.samplers.speculative.shapes import DynamicTree, DySpecTree, Sequences, StaticTree

__all__ = ["Additive", "DySpecTree", "DynamicTree", "Eagle", "Exact", "Grouped", "Jacobi", "KSequential", "Lantern",
           "ModelDraft", "Multiplicative", "Sequences", "Smaller", "Speculative", "StaticTree"]
