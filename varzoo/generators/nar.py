"""NAR: next-neighbour prediction (arXiv 2503.10696). Tokens of equal Manhattan distance from the first are one step.

Official code: ThisisBillhe/NAR, with which masks, loss, gradients and sampling agree. A head per axis predicts the next
neighbour along it: right (last axis) from the hidden state one block below the top, down from the top. A token with
several predicting neighbours gets the mean of their logits, in training too, so heads are never trained apart except at
borders.

As in LlamaGen, whose code it extends, prefix tokens have rotary rows of zeros. The right head is zero at first, the
down head is not.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.keymap import KeyMap, Rename
from varzoo.core.spec import TokenSpec
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.llama import LLAMA_RULES, LlamaGenerator
from varzoo.generators.orders import Order
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.initial import normal_weight
from varzoo.nn.rotary import axial_table, zero_rows


class NAR(LlamaGenerator):
    """Next-neighbour prediction on a grid: h + w - 1 steps for h x w tokens.

    Args:
        spec: discrete grid, square or not; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        width, heads: of the decoder.
        depth: blocks below the first head; the other one sits on one block more.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    goldens: ClassVar[tuple[str, ...]] = ("nar/[ct]2i_*", "nar/image_orders_rope")

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, depth: int, heads: int,
                 multiple_of: int = 256, norm_eps: float = 1e-5, token_dropout: float = 0.1,
                 attention_dropout: float = 0.1, mlp_dropout: float = 0.1) -> None:
        if spec.kind != "discrete" or spec.depth != 1 or spec.layout != "grid":
            raise ValueError(f"NAR models discrete grids of depth 1, got {spec}.")
        head_dim, axes = width // heads, len(spec.shape)
        super().__init__(
            spec=spec, conditioner=conditioner, order=Order.shells(conditioner.length, spec.shape),
            rows=torch.cat([zero_rows(conditioner.length, head_dim), axial_table(spec.shape, head_dim)]),
            width=width, depth=depth + axes - 1, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
            token_dropout=token_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.heads = nn.ModuleList(FewRowsLinear(width, spec.size, bias=False) for _ in range(axes))
        self.apply(normal_weight)
        nn.init.zeros_(next(self.heads[0].parameters()))

    def project(self, head: int, features: Tensor) -> Tensor:
        return self.heads[head](features)

    def key_maps(self) -> dict[str, KeyMap]:
        return {"nar": KeyMap([*LLAMA_RULES,
                               Rename("norm.weight", "stack.early_norms.0.weight"),
                               Rename("output.weight", "heads.0.weight"),
                               Rename("medusa_norm.weight", "stack.norm.weight"),
                               Rename("medusa_output.weight", "heads.1.weight")])}
