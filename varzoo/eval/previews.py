"""What an image looked like while its tokens were drawn: a strip and an animation per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor

from varzoo.core.checkpoint import atomic_path

SMALLEST = 64  # pixels; smaller images are enlarged by a whole factor
MILLISECONDS = 250  # per frame; the last one stays longer


def write_previews(folder: Path, frames: Tensor, indices: Sequence[int]) -> None:
    """Write INDEX.png, the frames side by side, and INDEX.gif for every image.

    Args:
        folder: made if it is missing.
        frames: uint8 `[B, frames, 3, H, W]`, in the order of their appearance.
        indices: of the images.
    """
    for index, images in zip(indices, frames):
        strip = enlarged(Image.fromarray(rearrange(images, "k c h w -> h (k w) c").numpy()), images.shape[-2])
        with atomic_path(folder / f"{index:06d}.png") as temporary:
            strip.save(temporary, format="PNG")
        first, *rest = (enlarged(Image.fromarray(rearrange(image, "c h w -> h w c").numpy()), images.shape[-2])
                        for image in images)
        with atomic_path(folder / f"{index:06d}.gif") as temporary:
            first.save(temporary, format="GIF", save_all=True, append_images=rest, loop=0,
                       duration=[MILLISECONDS] * len(rest) + [4 * MILLISECONDS])


def enlarged(image: Image.Image, height: int) -> Image.Image:
    """The image, of frames of this height, enlarged without smoothing where they are small."""
    factor = max(1, SMALLEST // height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
