"""Token-Shuffle (arXiv 2504.17789): s x s windows of tokens are fed to a causal transformer as one token.

There is no official code, and where the paper is silent the definition is ours (docs/token_shuffle.md says which):

    embed each id (d) -> linear to d / s^2 -> concatenate the window (d) -> n residual MLPs -> backbone
    backbone (d) -> n residual MLPs -> split into s^2 parts -> linear to d -> the backbone's head

The s^2 ids of a window are drawn at once, independently given everything before. The backbone is any causal generator
of the zoo: it sees the grid of windows as if it were a grid of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Concat, KeyMap, Rename, Rule
from varzoo.core.losses import Losses, weigh
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Batch
from varzoo.generators.causal import CausalGenerator, cross_entropy
from varzoo.generators.conditioners import Conditioner
from varzoo.nn.kv_cache import KVCache
from varzoo.nn.llama import Sight


class ResidualMLP(nn.Module):
    """x + down(gelu(up(norm(x)))), four times as wide inside; the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = fresh_linear(width, 4 * width)
        self.down = fresh_linear(4 * width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Shuffle(nn.Module):
    """Embeddings `[B, m k, width]` of m windows of k ids -> `[B, m, width]`."""

    def __init__(self, *, width: int, ids: int, blocks: int) -> None:
        super().__init__()
        self.ids = ids
        self.compress = fresh_linear(width, width // ids)
        self.blocks = nn.Sequential(*(ResidualMLP(width) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.compress(x).unflatten(1, (-1, self.ids)).flatten(2))


class Unshuffle(nn.Module):
    """Hidden states `[B, m, width]` of m windows of k ids -> features `[B, m k, width]` of the ids."""

    def __init__(self, *, width: int, ids: int, blocks: int) -> None:
        super().__init__()
        self.ids = ids
        self.blocks = nn.Sequential(*(ResidualMLP(width) for _ in range(blocks)))
        self.expand = fresh_linear(width // ids, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.blocks(x).unflatten(2, (self.ids, -1)).flatten(1, 2))


def fresh_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights N(0, 0.02) and no bias to begin with."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class TokenShuffle(CausalGenerator):
    """A causal generator that is fed windows of tokens.

    Args:
        spec: discrete grid whose sides are multiples of the window; `size` is the vocabulary.
        backbone: makes the causal generator of the grid of windows, given its `spec`.
        window: side s of a window. With 1, and without blocks, this is the backbone itself.
        blocks: residual MLPs before the backbone, and as many after it.
        z_loss: weight of the mean squared logarithm of the softmax's denominator in the loss; 0 leaves it out.
    """

    def __init__(self, *, spec: TokenSpec, backbone: Callable[..., CausalGenerator], window: int, blocks: int,
                 z_loss: float) -> None:
        super().__init__()
        if spec.kind != "discrete" or spec.depth != 1 or spec.layout != "grid":
            raise ValueError(f"Token-Shuffle models discrete grids of depth 1, got {spec}.")
        if window < 1 or blocks < 0 or z_loss < 0:
            raise ValueError(f"need window >= 1, blocks >= 0 and z_loss >= 0, got {window}, {blocks} and {z_loss}.")
        if any(side % window for side in spec.shape):
            height, width = spec.shape
            raise ValueError(f"a grid of {height} x {width} tokens does not split into windows of {window} x {window}: "
                             "choose a window that divides both sides.")
        self.spec, self.z_loss = spec, z_loss
        self.backbone = backbone(spec=replace(spec, shape=tuple(side // window for side in spec.shape)))
        self.order = self.backbone.order.windows(spec.shape, window)
        width, ids, heads = self.backbone.width, window * window, len(self.order.sources)
        if width % ids:
            raise ValueError(f"the backbone's width {width} must be a multiple of {ids}, the tokens in a window.")
        self.width = width
        if window == 1 and blocks == 0:  # the plain backbone, with nothing to learn around it
            self.shuffle: nn.Module = nn.Identity()
            self.unshuffle = nn.ModuleList(nn.Identity() for _ in range(heads))
        else:
            self.shuffle = Shuffle(width=width, ids=ids, blocks=blocks)
            self.unshuffle = nn.ModuleList(Unshuffle(width=width, ids=ids, blocks=blocks) for _ in range(heads))

    @property
    def conditioner(self) -> Conditioner:  # type: ignore[override]  # follows from its parts
        return self.backbone.conditioner

    def embed(self, ids: Tensor) -> Tensor:
        return self.shuffle(self.backbone.embed(ids))

    def run(self, x: Tensor, places: slice | Tensor, *, sight: Sight, cache: KVCache | None = None,
            slots: Tensor | None = None) -> list[Tensor]:
        return self.backbone.run(x, places, sight=sight, cache=cache, slots=slots)

    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        return self.backbone.new_cache(batch, spare)

    def features(self, head: int, hidden: Tensor) -> Tensor:
        return self.unshuffle[head](self.backbone.features(head, hidden))

    def project(self, head: int, features: Tensor) -> Tensor:
        return self.backbone.project(head, features)

    def loss(self, batch: Batch, draws: AnyDraws, progress: float) -> Losses:
        """Mean cross-entropy over all tokens, in nats, and the z-loss; samples are weighted by `batch.weights`."""
        logits = self.teach(batch, draws)
        parts = {"cross_entropy": cross_entropy(logits, batch.tokens)}
        if self.z_loss:
            parts["z"] = self.z_loss * logits.logsumexp(dim=-1).square().mean(dim=1)
        return weigh(parts, batch.weights)

    def key_maps(self) -> dict[str, KeyMap]:
        """The backbone's. Nothing of Token-Shuffle was published: they fit where window 1 leaves the backbone alone."""
        around = [Rename("shuffle.{rest*}", "shuffle.{rest*}"), Rename("unshuffle.{rest*}", "unshuffle.{rest*}")]
        return {name: KeyMap([*around, *(_of_backbone(rule) for rule in key_map.rules)])
                for name, key_map in self.backbone.key_maps().items()}


def _of_backbone(rule: Rule) -> Rule:
    """The rule for a model that is our `backbone`."""
    return replace(rule, ours=f"backbone.{rule.ours}") if isinstance(rule, Rename | Concat) else rule
