"""The convolutional encoder and decoder of VQGAN and latent diffusion (arXiv 2012.09841, 2112.10752).

The networks are diffusers', which compute the same as the official ones: ResNet blocks with GroupNorm(32, eps 1e-6) and
SiLU, single-head attention over all pixels of a map, downsampling by a stride-2 convolution after a zero row and column
at the bottom right, upsampling by nearest neighbour and convolution. What differs between the systems is which levels
attend, and the names of the weights; both are said here.

Level 0 is the full resolution; every level but the last halves it. A width is `width * multipliers[level]`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor

from varzoo.core.keymap import Ignore, Rename, Rule

GROUPS = 32  # of every norm, in all published networks


def build_encoder(*, width: int, multipliers: Sequence[int], blocks_per_level: int, attention_levels: Collection[int],
                  out_channels: int, groups: int = GROUPS) -> Encoder:
    """Images `[B, 3, H, W]` -> features `[B, out_channels, H / f, W / f]`, f = `downsampling(multipliers)`.

    Each level has `blocks_per_level` ResNet blocks, each followed by attention on the `attention_levels`.
    """
    attends = _attends(multipliers, attention_levels)
    return Encoder(
        in_channels=3,
        out_channels=out_channels,
        down_block_types=tuple("AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends),
        block_out_channels=_widths(width, multipliers, groups),
        layers_per_block=blocks_per_level,
        norm_num_groups=groups,
        double_z=False,
    )


def build_decoder(*, width: int, multipliers: Sequence[int], blocks_per_level: int, attention_levels: Collection[int],
                  in_channels: int, groups: int = GROUPS) -> Decoder:
    """Features `[B, in_channels, h, w]` -> images `[B, 3, h f, w f]`, not clamped.

    Each level has `blocks_per_level` + 1 ResNet blocks; levels are numbered as in the encoder, 0 at full resolution.
    """
    attends = _attends(multipliers, attention_levels)
    return Decoder(
        in_channels=in_channels,
        out_channels=3,
        up_block_types=tuple("AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)),
        block_out_channels=_widths(width, multipliers, groups),
        layers_per_block=blocks_per_level,
        norm_num_groups=groups,
    )


def downsampling(multipliers: Sequence[int]) -> int:
    """The factor by which these levels shrink height and width."""
    return 2 ** (len(multipliers) - 1)


def image_and_grid(image_size: int | Sequence[int], factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """An image size (one side or (height, width)) as (height, width), and its (h, w) grid of `factor`-sized squares.

    Raises ValueError unless both sides are positive multiples of `factor`.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(int(side) for side in image_size)
    if len(sides) != 2 or min(sides) < 1 or any(side % factor for side in sides):
        raise ValueError(f"image_size must be (height, width), both positive multiples of the tokenizer's "
                         f"downsampling factor {factor}; got {image_size}.")
    return sides, (sides[0] // factor, sides[1] // factor)


def require_images(images: Tensor, image_size: tuple[int, int]) -> None:
    """Raise ValueError unless `images` are `[B, 3, H, W]` of the size that the tokenizer was built for."""
    if images.ndim != 4 or images.shape[1:] != (3, *image_size):
        height, width = image_size
        raise ValueError(f"this tokenizer takes images [B, 3, {height}, {width}], got {list(images.shape)}; "
                         "resize them, or build it with their image_size (the weights fit any size).")


def llamagen_rules() -> list[Rule]:
    """Names of encoder and decoder in LlamaGen's VQModel, whose decoder counts levels as ours does, lowest first."""
    rules: list[Rule] = []
    for part, blocks, sample in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        rules += [
            *_resnet(f"{part}.conv_blocks.{{l}}.res.{{i}}", f"{part}.{blocks}.{{l}}.resnets.{{i}}"),
            *_attention(f"{part}.conv_blocks.{{l}}.attn.{{i}}", f"{part}.{blocks}.{{l}}.attentions.{{i}}"),
            Rename(f"{part}.conv_blocks.{{l}}.{sample}sample.conv.{{p}}",
                   f"{part}.{blocks}.{{l}}.{sample}samplers.0.conv.{{p}}"),
            *_resnet(f"{part}.mid.0", f"{part}.mid_block.resnets.0"),
            *_attention(f"{part}.mid.1", f"{part}.mid_block.attentions.0"),
            *_resnet(f"{part}.mid.2", f"{part}.mid_block.resnets.1"),
            *_ends(part),
        ]
    return rules


def latent_diffusion_rules(levels: int) -> list[Rule]:
    """Names in latent diffusion's and MAR's AutoencoderKL, whose decoder counts its levels from the full resolution."""
    rules: list[Rule] = []
    for part, blocks, sample in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        for level in range(levels):
            official = f"{part}.{sample}.{level}"
            ours = f"{part}.{blocks}.{level if part == 'encoder' else levels - 1 - level}"
            rules += [
                *_resnet(f"{official}.block.{{i}}", f"{ours}.resnets.{{i}}"),
                *_attention(f"{official}.attn.{{i}}", f"{ours}.attentions.{{i}}"),
                Rename(f"{official}.{sample}sample.conv.{{p}}", f"{ours}.{sample}samplers.0.conv.{{p}}"),
            ]
        rules += [
            *_resnet(f"{part}.mid.block_1", f"{part}.mid_block.resnets.0"),
            *_attention(f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0"),
            *_resnet(f"{part}.mid.block_2", f"{part}.mid_block.resnets.1"),
            *_ends(part),
        ]
    return rules


def binary_autoencoder_rules(*, multipliers: Sequence[int], blocks_per_level: int, decoder_blocks_per_level: int,
                             attention_levels: Collection[int], input_norm: bool) -> list[Rule]:
    """Names in binary latent diffusion's autoencoder (ELM), which numbers all layers of either side in one list.

    Its ResNet blocks hold a shortcut convolution (`conv_out`) even where they do not use it; those are left out.
    """
    attends, last = _attends(multipliers, attention_levels), len(multipliers) - 1
    lists: dict[str, list[tuple[str, str, bool]]] = {"encoder": [], "generator": []}  # (kind, our name, used shortcut)
    middle = [("resnet", "mid_block.resnets.0", False), ("attention", "mid_block.attentions.0", False),
              ("resnet", "mid_block.resnets.1", False)]
    ends = [("layer", "conv_norm_out", False), ("layer", "conv_out", False)]

    def level(block: str, count: int, attend: bool, changes: bool) -> list[tuple[str, str, bool]]:
        found = []
        for index in range(count):
            found.append(("resnet", f"{block}.resnets.{index}", changes and index == 0))
            found += [("attention", f"{block}.attentions.{index}", False)] * attend
        return found

    lists["encoder"].append(("layer", "conv_in", False))
    for index, width in enumerate(multipliers):
        changes = width != (multipliers[index - 1] if index else 1)
        lists["encoder"] += level(f"down_blocks.{index}", blocks_per_level, attends[index], changes)
        lists["encoder"] += [("sample", f"down_blocks.{index}.downsamplers.0", False)] * (index < last)
    lists["encoder"] += middle + ends
    lists["generator"] += [("layer", "", False)] * input_norm + [("layer", "conv_in", False)] + middle
    for index, width in reversed(list(enumerate(multipliers))):
        changes = width != multipliers[min(index + 1, last)]
        lists["generator"] += level(f"up_blocks.{last - index}", decoder_blocks_per_level, attends[index], changes)
        lists["generator"] += [("sample", f"up_blocks.{last - index}.upsamplers.0", False)] * (index > 0)
    lists["generator"] += ends

    rules: list[Rule] = []
    for part, mine in (("encoder", "encoder"), ("generator", "decoder")):
        for number, (kind, name, shortcut) in enumerate(lists[part]):
            official, ours = f"{part}.blocks.{number}", f"{mine}.{name}" if name else "input_norm"
            if kind == "resnet":
                rules.append(Rename(f"{official}.conv_out.{{p}}", f"{ours}.conv_shortcut.{{p}}") if shortcut
                             else Ignore(f"{official}.conv_out.{{p}}"))
                rules += _resnet(official, ours)
            elif kind == "attention":
                rules += _attention(official, ours)
            else:
                inner = ".conv" if kind == "sample" else ""
                rules.append(Rename(f"{official}{inner}.{{p}}", f"{ours}{inner}.{{p}}"))
    return rules


def _widths(width: int, multipliers: Sequence[int], groups: int) -> tuple[int, ...]:
    widths = tuple(width * multiplier for multiplier in multipliers)
    if not widths or any(channels < 1 or channels % groups for channels in widths):
        raise ValueError(f"every level's width (width x multiplier) must be a positive multiple of the {groups} norm "
                         f"groups; width {width} with multipliers {list(multipliers)} gives {list(widths)}.")
    return widths


def _attends(multipliers: Sequence[int], attention_levels: Collection[int]) -> list[bool]:
    levels = range(len(multipliers))
    if any(level not in levels for level in attention_levels):
        raise ValueError(f"attention_levels must lie in 0 (full resolution) to {len(multipliers) - 1}, "
                         f"got {list(attention_levels)}.")
    return [level in attention_levels for level in levels]


def _ends(part: str) -> list[Rule]:
    return [
        Rename(f"{part}.conv_in.{{p}}", f"{part}.conv_in.{{p}}"),
        Rename(f"{part}.norm_out.{{p}}", f"{part}.conv_norm_out.{{p}}"),
        Rename(f"{part}.conv_out.{{p}}", f"{part}.conv_out.{{p}}"),
    ]


def _resnet(official: str, ours: str) -> list[Rule]:
    names = ("norm1", "conv1", "norm2", "conv2")
    return [Rename(f"{official}.nin_shortcut.{{p}}", f"{ours}.conv_shortcut.{{p}}"),
            *(Rename(f"{official}.{name}.{{p}}", f"{ours}.{name}.{{p}}") for name in names)]


def _attention(official: str, ours: str) -> list[Rule]:
    # Official projections are 1x1 convolutions [C, C, 1, 1], ours linear [C, C].
    projections = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return [
        Rename(f"{official}.norm.{{p}}", f"{ours}.group_norm.{{p}}"),
        *(Rename(f"{official}.{theirs}.weight", f"{ours}.{mine}.weight",
                 convert=lambda weight: weight[..., 0, 0], revert=lambda weight: weight[..., None, None])
          for theirs, mine in projections.items()),
        *(Rename(f"{official}.{theirs}.bias", f"{ours}.{mine}.bias") for theirs, mine in projections.items()),
    ]
