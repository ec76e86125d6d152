"""Prefixes of token sequences: what tokenizers take of which any first k tokens decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from varzoo.core.draws import AnyDraws
from varzoo.core.spec import TokenSpec

Prefixes = Tensor | Sequence[Tensor]


def padded(tokens: Prefixes, spec: TokenSpec, lengths: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Prefixes in any form -> ids `[B, k]`, padded with id 0, and their lengths `[B]`; k is the longest.

    Args:
        tokens: ids `[B, k]`, or a sequence of B tensors `[k_i]`.
        spec: of the whole sequences.
        lengths: for ids `[B, k]`: how many of each row count; what stands behind them is ignored.

    Raises:
        ValueError: a prefix is empty or longer than the sequence, or an id is not in the codebook.
    """
    if isinstance(tokens, Tensor):
        if tokens.ndim != 2 or not len(tokens):
            raise ValueError(f"expected ids [B, k] or a sequence of prefixes [k] for {spec}, got {list(tokens.shape)}.")
        lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else torch.as_tensor(lengths)
        if lengths.shape != (len(tokens),):
            raise ValueError(f"expected one length for each of {len(tokens)} prefixes, got {list(lengths.shape)}.")
        if lengths.max() > tokens.shape[1]:
            raise ValueError(f"a length of {int(lengths.max())} exceeds the {tokens.shape[1]} ids that are given.")
    else:
        if lengths is not None:
            raise ValueError("a sequence of prefixes has its lengths already; give lengths with ids [B, k] only.")
        if not len(tokens) or any(prefix.ndim != 1 for prefix in tokens):
            raise ValueError(f"expected prefixes [k], got shapes {[list(prefix.shape) for prefix in tokens]}.")
        lengths = torch.tensor([len(prefix) for prefix in tokens])
        tokens = pad_sequence(list(tokens), batch_first=True)
    for length in (int(lengths.min()), int(lengths.max())):
        if not 1 <= length <= spec.length:
            raise ValueError(f"a prefix has between 1 and {spec.length} tokens, got {length}.")
    lengths = lengths.to(tokens.device)
    tokens = tokens[:, :int(lengths.max())]
    tokens = tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None], 0)
    if tokens.min() < 0 or tokens.max() >= spec.size:
        raise ValueError(f"ids must lie in 0 to {spec.size - 1}, the codebook; got {int(tokens.min())} to "
                         f"{int(tokens.max())}.")
    return tokens, lengths


def initial_noise(draws: AnyDraws | None, batch: int, size: tuple[int, ...]) -> Tensor:
    """Standard normals `[B, *size]` that a drawing decoder begins from: the stream "decoder_noise".

    Raises:
        ValueError: there are no draws, or not one row per sample.
    """
    if draws is None:
        raise ValueError("this decoder begins from noise: give draws, such as Draws(seed, range(len(tokens))).")
    if len(draws) != batch:
        raise ValueError(f"draws of {len(draws)} samples do not fit {batch} sequences of tokens.")
    return draws.normal("decoder_noise", size)
