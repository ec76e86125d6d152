"""FlexTok's generator (arXiv 2502.13967): a plain transformer over 1-D tokens that may draw as few as one likes.

No code of it was published. What is known of it: LlamaGen's decoder (one class token, or text features, first), with
learned absolute positions, since the tokens have no layout, and SwiGLU of hidden width 8/3 of the model's. That the
positions count the prefix tokens, too, is ours.
"""

from __future__ import annotations

from torch import Tensor, nn

from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.spec import TokenSpec
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.llamagen import NextToken
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Sight
from varzoo.nn.rotary import identity_rows


class FlexTokAR(NextToken):
    """Next-token prediction with learned positions.

    Args:
        spec: a discrete sequence; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        width, depth, heads: of the decoder.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, depth: int, heads: int,
                 multiple_of: int, norm_eps: float, token_dropout: float, attention_dropout: float,
                 mlp_dropout: float) -> None:
        if spec.kind != "discrete" or spec.depth != 1 or spec.layout != "sequence":
            raise ValueError(f"FlexTok's generator models discrete sequences of depth 1, got {spec}.")
        length = conditioner.length + spec.length
        super().__init__(
            spec=spec, conditioner=conditioner, rows=identity_rows(length, width // heads), width=width, depth=depth,
            heads=heads, multiple_of=multiple_of, norm_eps=norm_eps, token_dropout=token_dropout,
            attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.positions.weight, std=0.02)

    def run(self, x: Tensor, places: slice | Tensor, *, sight: Sight, cache: KVCache | None = None,
            slots: Tensor | None = None) -> list[Tensor]:
        known = places if isinstance(places, slice) else places.clamp(max=len(self.positions.weight) - 1)
        return super().run(x + self.positions.weight[known], places, sight=sight, cache=cache, slots=slots)

    def key_maps(self) -> dict[str, KeyMap]:
        """LlamaGen's names, and the positions; nothing was published."""
        return {name: KeyMap([Rename("positions.weight", "positions.weight"), *key_map.rules])
                for name, key_map in super().key_maps().items()}
