"""TokenBridge: masked autoregressive generation of latents that were quantised after training (arXiv 2503.16430).

The backbone is MAR's (`masked_transformer`); it reads what the ids stand for. At the positions of a step a causal
transformer draws the channels one after another instead of denoising them all (`nn.channel_transformer`, which names
two official faults that are kept). Guidance acts on the backbone's features, so that the head runs once, guided or not.

Official code: YuqingWang1029/TokenBridge, a fork of MAR's, with which quantisation, features, loss, gradients and
sampling agree. As in MAR, linear guidance stops short of its scale at the last step. The code's `use_quantized_value`
is ignored there: the encoder always sees quantised values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Ignore, KeyMap
from varzoo.core.losses import Losses, weighted_mean
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.masked import TruncatedNormalRate
from varzoo.generators.masked_transformer import MaskedDecoding, MaskedGenerator
from varzoo.nn.channel_transformer import ChannelTransformer, Classifier, channel_transformer_rules
from varzoo.nn.gaussian_quantizer import GaussianQuantizer, gaussian_bins
from varzoo.nn.masked_vit import MaskedViT
from varzoo.nn.rows import take_rows
from varzoo.predictions.base import Prediction
from varzoo.predictions.channels import ChannelPrediction


class TokenBridge(MaskedGenerator):
    """A masked autoencoder transformer with a channel-wise autoregressive head.

    Args:
        spec: discrete tokens; `spec.depth` channels of `spec.size` levels each.
        quantizer: what the ids stand for; the tokenizer's must be the same.
        num_classes: class labels it knows.
        encoder_width, encoder_depth, encoder_heads: size of the encoder.
        decoder_width, decoder_depth, decoder_heads: size of the decoder.
        mlp_ratio: hidden width of the blocks' MLPs over their width, in the head too.
        buffer_size: slots before the tokens that hold the class vector.
        norm_eps: of all LayerNorms.
        head_width, head_depth, head_heads: size of the channel head.
        channel_order: which channel is drawn first, second .. (published: by the share of low frequencies).
        classifier: (head_width, levels) -> the last layer of a channel: linear, as published, or a FourierHead.
        mask_ratio_min: least share of masked tokens in training.
        class_drop: probability that a sample is trained without its class.
        attention_dropout: on attention weights of the backbone.
        projection_dropout: after attention projections and inside the MLPs of the backbone.
    """

    goldens: ClassVar[tuple[str, ...]] = ("tokenbridge/*",)
    predicts: ClassVar[Mapping[str, type[Prediction]]] = {"main": ChannelPrediction}

    def __init__(self, *, spec: TokenSpec, quantizer: GaussianQuantizer, num_classes: int, encoder_width: int,
                 encoder_depth: int, encoder_heads: int, decoder_width: int, decoder_depth: int, decoder_heads: int,
                 mlp_ratio: float, buffer_size: int, norm_eps: float, head_width: int, head_depth: int,
                 head_heads: int, channel_order: Sequence[int], classifier: Callable[[int, int], Classifier],
                 mask_ratio_min: float, class_drop: float, attention_dropout: float,
                 projection_dropout: float) -> None:
        super().__init__(spec=spec, num_classes=num_classes, width=encoder_width, class_drop=class_drop)
        if spec.kind != "discrete" or spec.depth < 2:
            raise ValueError(f"TokenBridge models several discrete channels per token, got a spec of {spec}. Choose a "
                             "tokenizer that quantises latents, such as tokenbridge.")
        if spec.size != quantizer.levels or spec.depth != len(channel_order):
            raise ValueError(f"the spec has {spec.depth} channels of {spec.size} levels, but the channel order names "
                             f"{len(channel_order)} and the quantizer has {quantizer.levels} levels.")
        if not 0 < mask_ratio_min < 1:
            raise ValueError(f"need 0 < mask_ratio_min < 1, got {mask_ratio_min}.")
        self.quantizer = quantizer
        self.mask_rate = TruncatedNormalRate(low=mask_ratio_min)
        self.backbone = MaskedViT(
            length=spec.length, channels=spec.depth, encoder_width=encoder_width, encoder_depth=encoder_depth,
            encoder_heads=encoder_heads, decoder_width=decoder_width, decoder_depth=decoder_depth,
            decoder_heads=decoder_heads, mlp_ratio=mlp_ratio, buffer_size=buffer_size, norm_eps=norm_eps,
            attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        self.head = ChannelTransformer(
            feature_width=decoder_width, width=head_width, depth=head_depth, heads=head_heads, mlp_ratio=mlp_ratio,
            norm_eps=norm_eps, levels=spec.size, order=channel_order, classifier=classifier)

    def values(self, tokens: Tensor) -> Tensor:
        """What ids `[B, N, C]` stand for."""
        return self.quantizer.values(tokens)

    def targets(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Ids `[R, C]` of tokens `[B, N, C]` at positions `[B, n]`, R = B n, in the head's order."""
        return take_rows(tokens, at)[..., self.head.order].flatten(0, 1)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Cross-entropy of every channel at the masked positions, and what the classifiers add."""
        masked, rows = self.training_rows(batch.tokens, batch.condition, draws, self.mask_rate)
        targets = self.targets(batch.tokens, masked)
        hidden = self.head.hidden(rows.flatten(0, 1), targets[:, :-1], sampling=False)
        logits = self.head.logits(hidden).float()
        entropy = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").view(len(batch.tokens), -1)
        penalty = self.head.penalty(hidden)
        accuracy = (logits.argmax(dim=-1) == targets).float().mean()
        return Losses(total=weighted_mean(entropy.mean(dim=1), batch.weights) + penalty,
                      parts={"cross_entropy": entropy.detach().mean(), "accuracy": accuracy,
                             "penalty": penalty.detach()})

    def begin(self, condition: Condition, *, draws: AnyDraws,
              guidance: Schedule | Mapping[str, Schedule] | None = None, plan: Any = None) -> TokenBridgeDecoding:
        steps, guidance = self.begun(condition, draws, guidance, plan)
        tokens = torch.zeros(condition.size, self.spec.length, self.spec.depth, dtype=torch.int64,
                             device=self.null_class.device)
        return TokenBridgeDecoding(self, tokens, self.class_vectors(condition), steps, guidance)

    def key_maps(self) -> dict[str, KeyMap]:
        """The official layout "tokenbridge"; its files have linear classifiers, and tables under `model` alone."""
        levels, channels, spread = self.spec.size, self.spec.depth, self.quantizer.spread
        causal = partial(torch.full, (channels, channels), -torch.inf)
        return {"tokenbridge": KeyMap([
            *self.common_rules(output_positions="output_pos_embed"), *channel_transformer_rules(),
            Ignore("channel_mask", lambda: causal().triu(1)),
            Ignore("boundaries", lambda: gaussian_bins(levels, spread)[0]),
            Ignore("reconstruction_values", lambda: gaussian_bins(levels, spread)[1]),
        ])}


class TokenBridgeDecoding(MaskedDecoding):
    """Known ids and what is still to come."""

    generator: TokenBridge

    def predict(self, step: Step) -> ChannelPrediction:
        rows, scale = self.rows(step)
        features = rows[0] if len(rows) == 1 else rows[1] + scale * (rows[0] - rows[1])
        return ChannelPrediction(features=features, positions=step.positions, head=self.generator.head)
