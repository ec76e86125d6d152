"""D-AR's tokenizer: tokens whose groups condition one denoising step after the other (arXiv 2505.23660)."""

from varzoo.tokenizers.dar.networks import CausalContexts, QueryEncoder, VelocityNetwork
from varzoo.tokenizers.dar.segments import Segments
from varzoo.tokenizers.dar.tokenizer import DARTokenizer

__all__ = ["CausalContexts", "DARTokenizer", "QueryEncoder", "Segments", "VelocityNetwork"]
