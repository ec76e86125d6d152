"""TokenBridge's head (arXiv 2503.16430, 3.3): the channels of one position, one after another, by a causal transformer.

A feature vector becomes the condition c. Channel k, in the head's order, is predicted from the sequence c, channel 0,
.., channel k - 1; every block is modulated by c plus an embedding of k (adaLN, arXiv 2212.09748).

Official faults, kept because the published numbers have them: in sampling the first element is c plus the embedding of
step 0, in training it is c alone; and the last modulation holds the scale before the shift, the blocks' the shift
before the scale. Computed otherwise, with equal results: sampling keeps keys and values, where the official code runs
the whole prefix anew (its cache is never used).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from varzoo.core.keymap import Rename, Rule
from varzoo.nn.fourier_head import FourierHead
from varzoo.nn.initial import xavier_linear
from varzoo.nn.kv_cache import KVCache

Classifier = nn.Linear | FourierHead


class ChannelAttention(nn.Module):
    """Causal self-attention with normalised queries and keys; the keys and values of earlier channels may be cached."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.LayerNorm]) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the head's width {width} must be a multiple of its {heads} heads.")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, slots: Tensor) -> Tensor:
        """x `[R, n, width]` at slots `[n]`: all of them, or with a cache the next one."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update(layer, slots, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ChannelBlock(nn.Module):
    """x + gate attention(norm(x) (1 + scale) + shift), then the same with the MLP; activated conditions modulate."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm: Callable[[int], nn.LayerNorm]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = ChannelAttention(width, heads, norm)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cache: KVCache | None, layer: int, slots: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cache, layer, slots)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


@dataclass(frozen=True)
class ChannelState:
    """What the head keeps of rows whose channels are being drawn: conditions `[R, width]`, keys and values."""

    condition: Tensor
    cache: KVCache


class ChannelTransformer(nn.Module):
    """Features of positions -> logits of their channels, in the order in which the head draws them.

    Args:
        feature_width: of the features.
        width, depth, heads, mlp_ratio: of the transformer.
        norm_eps: of every LayerNorm.
        levels: ids per channel.
        order: which channel is drawn first, second ..; a permutation of all.
        classifier: makes what turns a hidden vector into logits, one per channel: (width, levels) -> `nn.Linear`, or
            a FourierHead.
    """

    order: Tensor
    inverse: Tensor
    slots: Tensor

    def __init__(self, *, feature_width: int, width: int, depth: int, heads: int, mlp_ratio: float, norm_eps: float,
                 levels: int, order: Sequence[int], classifier: Callable[[int, int], Classifier]) -> None:
        super().__init__()
        channels = len(order)
        if sorted(order) != list(range(channels)):
            raise ValueError(f"a channel order names every channel from 0 to {channels - 1} once, got {list(order)}.")
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.levels = levels
        self.condition = nn.Linear(feature_width, width)
        self.positions = nn.Parameter(torch.empty(1, channels, width))
        self.condition_positions = nn.Parameter(torch.empty(1, channels, width))
        self.embeddings = nn.ModuleList(nn.Embedding(levels, width) for _ in range(channels - 1))
        self.blocks = nn.ModuleList(ChannelBlock(width, heads, mlp_ratio, norm) for _ in range(depth))
        self.norm, self.last_norm = norm(width), norm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.classifiers = nn.ModuleList(classifier(width, levels) for _ in range(channels))
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse", torch.tensor(order).argsort(), persistent=False)
        self.register_buffer("slots", torch.arange(channels), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As officially; embeddings and Fourier heads keep their own."""
        linear = [module for part in (self.condition, self.blocks) for module in part.modules()]
        xavier_linear([*linear, *self.classifiers])
        layer: Any
        for layer in (self.modulation, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for table in (self.positions, self.condition_positions):
            nn.init.normal_(table, std=0.02)

    @property
    def channels(self) -> int:
        return len(self.classifiers)

    def hidden(self, features: Tensor, before: Tensor, *, sampling: bool) -> Tensor:
        """Hidden vectors `[R, j + 1, width]` of the first j + 1 channels of R positions.

        Args:
            features: `[R, feature_width]`.
            before: `[R, j]` ids of the first j channels, in the head's order, j < channels.
            sampling: begin the sequence as the official sampler does, not as its training does.
        """
        condition = self.condition(features)
        count = before.shape[1] + 1
        conditions = condition[:, None] + self.condition_positions[:, :count]
        first = conditions[:, 0] if sampling else condition
        sequence = [first, *(embed(ids) for embed, ids in zip(self.embeddings, before.unbind(1)))]
        return self._run(torch.stack(sequence, dim=1), conditions, None, self.slots[:count])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[R, n, levels]` from hidden vectors `[R, n, width]` of the first n channels."""
        return torch.stack([classify(x) for classify, x in zip(self.classifiers, hidden.unbind(1))], dim=1)

    def penalty(self, hidden: Tensor) -> Tensor:
        """What the classifiers add to the loss of hidden vectors `[R, channels, width]`; linear ones nothing."""
        penalties = [classify.penalty(x) for classify, x in zip(self.classifiers, hidden.unbind(1))
                     if isinstance(classify, FourierHead)]
        return torch.stack(penalties).mean() if penalties else hidden.new_zeros(())

    def start(self, features: Tensor) -> ChannelState:
        """Before the first channel of features `[R, feature_width]`."""
        condition = self.condition(features)
        first: Any = self.blocks[0]
        heads, width = first.attn.heads, condition.shape[-1]
        cache = KVCache(layers=len(self.blocks), batch=len(condition), heads=heads, slots=self.channels,
                        head_dim=width // heads, dtype=condition.dtype, device=condition.device)
        return ChannelState(condition, cache)

    def step(self, state: ChannelState, k: int, previous: Tensor | None) -> Tensor:
        """Logits `[R, levels]` of channel k, given the ids `[R]` of channel k - 1 (None for the first).

        Equal to the last row of `hidden(.., sampling=True)`; a step may be taken again with other ids.
        """
        condition = state.condition + self.condition_positions[:, k]
        x = condition if k == 0 else self.embeddings[k - 1](previous)
        state.cache.reach = k + 1
        hidden = self._run(x[:, None], condition[:, None], state.cache, self.slots[k:k + 1])
        return self.classifiers[k](hidden[:, 0])

    def _run(self, x: Tensor, conditions: Tensor, cache: KVCache | None, slots: Tensor) -> Tensor:
        """Embedded channels `[R, n, width]` at slots `[n]` with a condition each -> hidden vectors."""
        x, activated = x + self.positions[:, slots], F.silu(conditions)
        for layer, block in enumerate(self.blocks):
            x = block(x, activated, cache, layer, slots)
        scale, shift = self.modulation(activated).chunk(2, dim=-1)
        return self.last_norm(self.norm(x)) * (1 + scale) + shift


def channel_transformer_rules() -> list[Rule]:
    """Key map rules of the head with linear classifiers, which is `head` with us and has no prefix officially."""
    names = {
        "condition_proj.{p}": "condition.{p}",
        "channel_embed": "positions",
        "timesteps_embeddings": "condition_positions",
        "token_embeddings.{i}.weight": "embeddings.{i}.weight",
        "channel_blocks.{i}.adaLN_modulation.1.{p}": "blocks.{i}.modulation.{p}",
        "channel_blocks.{i}.{rest*}": "blocks.{i}.{rest*}",
        "channel_norm.{p}": "norm.{p}",
        "channel_final.adaLN_modulation.1.{p}": "modulation.{p}",
        "channel_heads.{rest*}": "classifiers.{rest*}",
    }
    return [Rename(official, f"head.{ours}") for official, ours in names.items()]
