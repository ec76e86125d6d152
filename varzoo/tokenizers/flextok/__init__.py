"""FlexTok: 1-D tokens, coarse to fine, decoded by a rectified flow from any prefix."""

from varzoo.tokenizers.flextok.networks import FlowDecoder, RegisterEncoder
from varzoo.tokenizers.flextok.tokenizer import FlexTok

__all__ = ["FlexTok", "FlowDecoder", "RegisterEncoder"]
