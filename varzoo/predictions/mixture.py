"""Vectors drawn from a mixture of Gaussians per position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from varzoo.core.draws import AnyDraws, inverse_cdf
from varzoo.nn.gaussian_mixture import GaussianMixture
from varzoo.predictions.base import Drawn, Prediction
from varzoo.predictions.categorical import top_p_filter


@dataclass(frozen=True, kw_only=True)
class MixturePrediction(Prediction):
    """Vectors `[B, n, C]` at raster positions `[B, n]`.

    Attributes:
        mixture: of every position, guidance applied.
        positions: which positions are drawn.
        redraw: how often they were drawn before; every time has draws of its own.
        carry: the mixture too, by which a decoding judges what was drawn.
    """

    mixture: GaussianMixture
    positions: Tensor
    redraw: int

    options: ClassVar[frozenset[str]] = frozenset({"temperature", "top_p"})

    @property
    def carry(self) -> GaussianMixture:
        return self.mixture

    def draw(self, draws: AnyDraws, *, temperature: float = 1.0, top_p: float = 1.0) -> Drawn:
        """Draw a component of every position, then a vector around its mean.

        Args:
            draws: one row per sample.
            temperature: scale of the noise around the mean; at 0 the mean is taken.
            top_p: draw among the likeliest components only, whose mass exceeds this.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got temperature={temperature:g}, "
                             f"top_p={top_p:g}.")
        mixture, at = self.mixture, self.positions
        probabilities = top_p_filter(mixture.logits, top_p).softmax(dim=-1)
        component = inverse_cdf(probabilities, draws.uniform("component", at=at, redraw=self.redraw))
        noise = draws.normal("noise", (mixture.centres.shape[1],), at=at, redraw=self.redraw)
        return Drawn(tokens=mixture.means(component) + temperature * mixture.variance.sqrt()[..., None] * noise)
