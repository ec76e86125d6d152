"""D-AR's generator (arXiv 2505.23660): LlamaGen's decoder over a sequence of tokens, with one-dimensional positions.

As in the official code, the class token is an ordinary position, the first (LlamaGen's has rotary rows of zeros), and
guidance grows from token to token (`varzoo.core.steps.Linspace`).
"""

from __future__ import annotations

from typing import ClassVar

from varzoo.core.spec import TokenSpec
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.llamagen import NextToken
from varzoo.nn.rotary import line_table


class DAR(NextToken):
    """Next-token prediction with one-dimensional rotary positions.

    Positions need the number of tokens alone, so grids and videos are as good as sequences: they are read in raster
    order.

    Args:
        spec: discrete tokens of depth 1; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        width, depth, heads: of the decoder.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    goldens: ClassVar[tuple[str, ...]] = ("dar/ar_*", "dar/rope")

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, depth: int, heads: int,
                 multiple_of: int = 256, norm_eps: float = 1e-5, token_dropout: float = 0.1,
                 attention_dropout: float = 0.1, mlp_dropout: float = 0.1) -> None:
        if spec.kind != "discrete" or spec.depth != 1:
            raise ValueError(f"D-AR's generator models discrete tokens of depth 1, got {spec}.")
        super().__init__(
            spec=spec, conditioner=conditioner, rows=line_table(conditioner.length + spec.length, width // heads),
            width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
            token_dropout=token_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
