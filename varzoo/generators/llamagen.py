"""LlamaGen (arXiv 2406.06525): a plain LLaMA decoder over raster-ordered VQ codes, class- or text-conditional.

As in the official code, and unlike a textbook decoder:
- prefix tokens have rotary rows of zeros, so their queries and keys vanish: every token attends to them with the
  weight of a zero logit, and they attend uniformly;
- a text prefix keeps its caption's padding mask in the null branch of guidance too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from varzoo.core.keymap import Ignore, KeyMap, Rename
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Condition
from varzoo.generators.conditioners import Conditioner
from varzoo.generators.llama import LLAMA_RULES, LlamaGenerator
from varzoo.generators.orders import Order
from varzoo.nn.few_rows import FewRowsLinear
from varzoo.nn.initial import normal_weight
from varzoo.nn.llama import huggingface_rules
from varzoo.nn.rotary import axial_table, zero_rows


class NextToken(LlamaGenerator):
    """Next-token prediction in raster order, with one linear head.

    Args are those of `LlamaGenerator`, but for the order.
    """

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, rows: Tensor, width: int, depth: int, heads: int,
                 multiple_of: int, norm_eps: float, token_dropout: float, attention_dropout: float,
                 mlp_dropout: float) -> None:
        super().__init__(spec=spec, conditioner=conditioner, order=Order.raster(conditioner.length, spec.length),
                         rows=rows, width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
                         token_dropout=token_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)
        self.head = FewRowsLinear(width, spec.size, bias=False)
        self.apply(normal_weight)
        nn.init.zeros_(self.head.weight)

    def project(self, head: int, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, tokens: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Teacher-forced logits `[B, T + m, V]` for the first m tokens `[B, m]`; row T - 1 + i predicts token i."""
        return self.head(self.hidden(tokens, condition, dropped)[0]).float()

    def key_maps(self) -> dict[str, KeyMap]:
        return {"llamagen": KeyMap([*LLAMA_RULES, Rename("norm.weight", "stack.norm.weight"),
                                    Rename("output.weight", "head.weight")])}


class LlamaGen(NextToken):
    """Next-token prediction with axial rotary positions.

    Args:
        spec: discrete grid; `size` is the vocabulary.
        conditioner: what the prefix tokens are.
        width, depth, heads: of the decoder.
        multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        token_dropout: dropout on embeddings, prefix included.
        attention_dropout, mlp_dropout: dropout on the outputs of attention and MLP.
    """

    goldens: ClassVar[tuple[str, ...]] = ("llamagen/[ct]2i_*", "llamagen/pipeline", "llamagen/rope2d")

    def __init__(self, *, spec: TokenSpec, conditioner: Conditioner, width: int, depth: int, heads: int,
                 multiple_of: int = 256, norm_eps: float = 1e-5, token_dropout: float = 0.1,
                 attention_dropout: float = 0.1, mlp_dropout: float = 0.1) -> None:
        if spec.kind != "discrete" or spec.depth != 1 or spec.layout != "grid":
            raise ValueError(f"LlamaGen models discrete grids of depth 1, got {spec}.")
        head_dim = width // heads
        super().__init__(
            spec=spec, conditioner=conditioner,
            rows=torch.cat([zero_rows(conditioner.length, head_dim), axial_table(spec.shape, head_dim)]),
            width=width, depth=depth, heads=heads, multiple_of=multiple_of, norm_eps=norm_eps,
            token_dropout=token_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout)

    def key_maps(self) -> dict[str, KeyMap]:
        """The official layout, and LANTERN's, which is Hugging Face's of Llama."""
        return super().key_maps() | {"lantern": KeyMap([
            Rename("model.embed_tokens.weight", "embedding.weight"),
            Rename("model.cls_embedding.embedding_table.weight", "conditioner.table.weight"),
            Rename("model.cls_embedding.cap_proj.fc1.weight", "conditioner.projection.0.weight"),
            Rename("model.cls_embedding.cap_proj.fc2.weight", "conditioner.projection.2.weight"),
            Rename("model.cls_embedding.uncond_embedding", "conditioner.null_features"),
            *huggingface_rules("model.layers.{i}", "stack.blocks.{i}"),
            Rename("model.norm.weight", "stack.norm.weight"), Rename("lm_head.weight", "head.weight"),
            Ignore("model.freqs_cis")])}
