"""D-AR's sequential diffusion tokenizer (arXiv 2505.23660): 1-D codes that paint an image by flow matching.

Official code: showlab/D-AR, with which encoding, decoding, previews, losses and gradients agree. The i-th group of
codes conditions the i-th part of the flow, so decoding begins when the first group is there (see `GroupStream`).

As in the official code, and unlike the rest of varzoo's flows, time 0 is noise and 1 is data; Adams-Bashforth's method
has the coefficients of a uniform grid although the grid is not uniform; codes behind the group that a training sample
decodes get no codebook loss. Not here: the variant without a codebook (`vq_enable: false`), which was not released.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown
from varzoo.core.keymap import KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.nn.codebook import entropy_loss, perplexity, squared_distances
from varzoo.nn.conv_autoencoder import require_images
from varzoo.nn.processes import mean_over_processes
from varzoo.nn.repa import REPA
from varzoo.tokenizers.base import UINT8_RULES, Stream, Tokenizer
from varzoo.tokenizers.dar.networks import CausalContexts, QueryEncoder, VelocityNetwork
from varzoo.tokenizers.dar.official import read_settings, rules
from varzoo.tokenizers.dar.segments import Segments
from varzoo.tokenizers.prefixes import Prefixes, initial_noise, padded


class DARTokenizer(Tokenizer):
    """Queries of an image, quantised, each group of them a step of the flow that paints it.

    Args:
        image_size: (height, width) in pixels.
        encoder, contexts, network: the three transformers.
        segments: which codes condition which part of the flow.
        codebook_size: number of codes K, compared with the latents on the unit sphere.
        code_channels: dimension of a code.
        data_std: deviation to which pixels are scaled for the flow.
        commitment, entropy_weight: weights of the commitment and entropy losses (released: 0.25 and 0).
        repa: alignment of the network's features with a pretrained network's in training, None for none.
        steps: solver steps of `decode`.
        order: of its solver: 2 (Adams-Bashforth) or 1 (Euler).
        uint8_rule: how decoded images are rounded.

    Tokens are ids `[B, N]`; `decode` takes prefixes of at least a group.
    """

    goldens: ClassVar[tuple[str, ...]] = ("dar/codebook_*", "dar/decod*", "dar/pipeline", "dar/reconstruct",
                                       "dar/tokenizer_*")
    options = frozenset({"steps", "order"})

    def __init__(self, *, image_size: Sequence[int], encoder: QueryEncoder, contexts: CausalContexts,
                 network: VelocityNetwork, segments: Segments, codebook_size: int, code_channels: int, data_std: float,
                 commitment: float, entropy_weight: float, repa: REPA | None, steps: int, order: int,
                 uint8_rule: str) -> None:
        super().__init__()
        counts = {"segments.tokens": segments.tokens, "encoder.queries": encoder.queries,
                  "contexts.queries": contexts.queries}
        if len(set(counts.values())) > 1:
            raise ValueError("D-AR's parts do not fit: " + ", ".join(f"{k} is {v}" for k, v in counts.items()))
        if uint8_rule not in UINT8_RULES:
            raise unknown("uint8 rule", uint8_rule, UINT8_RULES)
        self.image_size, self.uint8_rule = (image_size[0], image_size[1]), uint8_rule
        self.encoder, self.contexts, self.network, self.repa = encoder, contexts, network, repa
        self.segments, self.data_std = segments, data_std
        self.shortest_prefix = segments.group_size
        self.commitment, self.entropy_weight = commitment, entropy_weight
        self.steps, self.order = steps, order
        self.embedding = nn.Embedding(codebook_size, code_channels)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(nn.init.uniform_(self.embedding.weight, -1, 1), dim=-1))
        self.spec = TokenSpec(kind="discrete", shape=(segments.tokens,), size=codebook_size, prefix_decodes=True)

    @classmethod
    def settings_of(cls, path: Path) -> tuple[dict[str, Any], list[str]]:
        return read_settings(path)

    def codebook(self) -> Tensor:
        """The code vectors `[K, code_channels]` as decoded: of unit length."""
        return F.normalize(self.embedding.weight, dim=-1)

    def stored_codebook(self) -> Tensor:
        return self.embedding.weight

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids `[B, n]` -> their code vectors `[B, n, code_channels]`."""
        return F.embedding(ids, self.codebook())

    def require_ids(self, ids: Tensor) -> None:
        """Raise ValueError unless all ids are in the codebook."""
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.spec.size):
            raise ValueError(f"ids must lie in 0 to {self.spec.size - 1}, the codebook; got {int(ids.min())} to "
                             f"{int(ids.max())}.")

    def latents(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, N, code_channels]`, not normalised."""
        require_images(images, self.image_size)
        return self.encoder(images)

    def compress(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> ids `[B, N]`."""
        return squared_distances(F.normalize(self.latents(images), dim=-1), self.codebook()).argmin(dim=-1)

    def tokens(self, compressed: Tensor, draws: AnyDraws | None = None) -> Tensor:
        """Ids are tokens already, there is nothing to draw."""
        return compressed

    def stream(self, draws: AnyDraws, *, steps: int | None = None,  # type: ignore[override]  # these are its `options`
               order: int | None = None) -> GroupStream:
        """A decoding of one image per row of draws, to which tokens are pushed as they come."""
        return self._begin(initial_noise(draws, len(draws), (3, *self.image_size)), steps, order)

    def decode(self, tokens: Prefixes, draws: AnyDraws | None = None, *, lengths: Tensor | Sequence[int] | None = None,
               steps: int | None = None, order: int | None = None) -> Tensor:
        """Prefixes of ids -> images `[B, 3, H, W]`, not clamped: previews where groups are missing.

        Args:
            tokens: ids `[B, k]`, or a sequence of B prefixes `[k_i]`, of at least a group each; what stands behind the
                last complete group has no effect.
            draws: one row per sample, for the noise that the flow begins from.
            lengths: of the prefixes in ids `[B, k]`.
            steps, order: instead of the tokenizer's own.
        """
        ids, lengths = padded(tokens, self.spec, lengths)
        noise = initial_noise(draws, len(ids), (3, *self.image_size))
        images: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():  # equal prefixes go together
            rows = (lengths == length).nonzero()[:, 0].tolist()
            stream = self._begin(noise[rows], steps, order)
            stream.push(ids[rows, :length])
            images |= dict(zip(rows, stream.preview()))
        return torch.stack([images[row] for row in range(len(ids))])

    def reconstruction_losses(self, images: Tensor, draws: AnyDraws) -> tuple[Tensor, Losses]:
        """The image that one evaluation at a random time jumps to, and flow, codebook and REPA losses.

        LPIPS of that image is the objective's (released: weight 0.5, no pixel loss). Draws: "progress" per sample,
        which chooses both group and time, and "noise".
        """
        latents, codebook = F.normalize(self.latents(images), dim=-1), self.codebook()
        distances = squared_distances(latents, codebook)
        ids = distances.argmin(dim=-1)
        codes = F.embedding(ids, codebook)
        contexts = self.contexts(latents + (codes - latents).detach())

        progress = draws.uniform("progress")
        starts = self.segments.starts(progress)[:, None]
        group = starts + torch.arange(self.segments.group_size, device=ids.device)
        times = self.segments.times(progress)
        at = times[:, None, None, None]
        data, noise = self.data_std * images, draws.normal("noise", tuple(images.shape[1:]))
        noised = at * data + (1 - at) * noise
        velocity, features = self.network(
            noised, times, contexts.gather(1, group[..., None].expand(-1, -1, contexts.shape[-1])),
            features_after=self.repa.layer if self.repa else None)

        counted = (torch.arange(self.spec.length, device=ids.device) <= group[:, -1:]).float()
        count = mean_over_processes(counted.sum())  # so that the processes' losses average to that of the whole batch
        mean = lambda values: (values * counted).sum() / count  # noqa: E731
        parts = {
            "flow": (velocity - (data - noise)).square().mean() / self.data_std**2,
            "vq": mean((codes - latents.detach()).square().mean(dim=-1)),
            "commitment": self.commitment * mean((latents - codes.detach()).square().mean(dim=-1)),
        }
        if self.entropy_weight:
            parts["entropy"] = self.entropy_weight * entropy_loss(-distances)
        if self.repa is not None:
            parts["repa"] = self.repa.weight * self.repa(features, self.network.grid, images)
        statistics = {"perplexity": perplexity(ids, self.spec.size)}
        reconstructions = (noised + (1 - at) * velocity) / self.data_std
        return reconstructions, Losses(sum(parts.values()),
                                       {name: part.detach() for name, part in (parts | statistics).items()})

    def key_maps(self) -> dict[str, KeyMap]:
        """Official layouts: "dar" (files keep it under the keys `ema` and `model`)."""
        return {"dar": KeyMap(rules(modulated_output=self.network.output_modulation is not None,
                                    repa=self.repa is not None))}

    def _begin(self, noise: Tensor, steps: int | None, order: int | None) -> GroupStream:
        return GroupStream(self, noise, steps=self.steps if steps is None else steps,
                      order=self.order if order is None else order)


class GroupStream(Stream):
    """The state of one batch of images being decoded.

    A solver step is taken as soon as the tokens that condition it are there, however they are pushed, and its contexts
    are computed in pieces that the plan alone decides: so the image is the same to the last bit whatever came when.

    Args:
        tokenizer: what decodes.
        noise: `[B, 3, H, W]`, standard normal.
        steps: solver steps in all.
        order: 1 is Euler's method; 2 Adams-Bashforth's, with the coefficients of a uniform grid, as officially.

    Attributes:
        done: solver steps that were taken.
    """

    def __init__(self, tokenizer: DARTokenizer, noise: Tensor, *, steps: int, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"the solver's order is 1 (Euler) or 2 (Adams-Bashforth), got {order!r}.")
        self.tokenizer, self.order, self.done = tokenizer, order, 0
        self._starts, self._times = tokenizer.segments.plan(steps)
        self._ids = torch.empty(len(noise), 0, dtype=torch.int64, device=noise.device)
        self._contexts: list[Tensor] = []
        self._cache = tokenizer.contexts.new_cache(len(noise))
        self._sample = self._before = noise
        self._velocity: Tensor | None = None
        self._slope: Tensor | None = None

    @property
    def steps(self) -> int:
        """Solver steps in all."""
        return len(self._starts)

    @torch.no_grad()
    def push(self, ids: Tensor) -> int:
        """Take the next ids `[B, n]`, any number, and every solver step that they allow; returns how many.

        Raises:
            ValueError: an id is not in the codebook, or there are more than the tokens of an image.
        """
        spec, before = self.tokenizer.spec, self.done
        if ids.shape[1] + self._ids.shape[1] > spec.length:
            raise ValueError(f"an image has {spec.length} tokens, but {self._ids.shape[1]} + {ids.shape[1]} were "
                             "pushed.")
        self.tokenizer.require_ids(ids)
        self._ids = torch.cat([self._ids, ids], dim=1)
        while self.done < self.steps:
            start = self._starts[self.done]
            end = start + self.tokenizer.segments.group_size
            if end > self._ids.shape[1]:
                break
            self._step(self._contexts_until(end)[:, start:end])
        return self.done - before

    def preview(self) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped: the last step taken, prolonged to the end; the image itself after all.

        Raises:
            ValueError: no group is complete yet.
        """
        if self._slope is None:
            raise ValueError(f"there is nothing to see before the first {self.tokenizer.segments.group_size} tokens, "
                             f"which condition the first step; {self._ids.shape[1]} are there.")
        jump = 1 - self._times[self.done - 1]
        return (self._before + jump * self._slope) / self.tokenizer.data_std

    def _contexts_until(self, end: int) -> Tensor:
        known = sum(part.shape[1] for part in self._contexts)
        if known < end:
            codes = self.tokenizer.lookup(self._ids[:, known:end])
            self._contexts.append(self.tokenizer.contexts.extended(codes, self._cache))
        return torch.cat(self._contexts, dim=1)

    def _step(self, contexts: Tensor) -> None:
        time, after = self._times[self.done:self.done + 2]
        times = self._sample.new_full((len(self._sample),), time)
        velocity, _ = self.tokenizer.network(self._sample, times, contexts)
        self._slope = velocity
        if self.order == 2 and self._velocity is not None:
            self._slope = 1.5 * velocity - 0.5 * self._velocity
        self._before, self._velocity = self._sample, velocity
        self._sample = self._sample + (after - time) * self._slope
        self.done += 1
