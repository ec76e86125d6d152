"""From a picture of any size to the picture that a model sees.

A transform turns a PIL RGB image into one of exactly `image_size`. Those with a fixed list of `views` (plain and
mirrored; ten crops) can be cached, since every view can be written down; those without (a random crop) draw afresh each
time. What is drawn is looked up by (seed, dataset index, iteration) in `varzoo.core.draws`: nothing is consumed, so an
item is the same in every worker, on every rank and after every resumed run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from PIL import Image, ImageOps
from torchvision.transforms.functional import ten_crop

from varzoo.core.draws import AnyDraws
from varzoo.core.errors import unknown

Size = tuple[int, int]


def as_size(image_size: int | tuple[int, int]) -> Size:
    """(height, width) of a size that may be given as one number for a square."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(int(side) for side in image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be one positive number or (height, width), got {image_size!r}.")
    return size


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Shrink or enlarge so that `size` (height, width) is just covered and the aspect ratio kept.

    Halves with a box filter while both sides allow it, then resizes bicubically (ADM, arXiv 2105.05233, its released
    data loader). For a square size the smaller side becomes exactly that side.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """ADM's centre crop to (height, width): cover, then cut out the centre; offsets are rounded down."""
    image = resize_to_cover(image, size)
    return _window(image, size, (image.height - size[0]) // 2, (image.width - size[1]) // 2)


def _window(image: Image.Image, size: Size, top: int, left: int) -> Image.Image:
    return image.crop((left, top, left + size[1], top + size[0]))


class Transform(ABC):
    """A picture of any size -> an RGB picture of `image_size` (height, width).

    Attributes:
        image_size: (height, width) of what comes out.
        views: how many different pictures one original gives, None where they cannot be listed.
    """

    image_size: Size
    views: int | None

    @abstractmethod
    def __call__(self, image: Image.Image, draws: AnyDraws) -> Image.Image:
        """The picture that one sample's `draws` (a batch of one) choose."""


class Views(Transform):
    """A transform whose views can be listed; one of them is drawn uniformly."""

    views: int

    @abstractmethod
    def view(self, image: Image.Image, number: int) -> Image.Image:
        """View `number` of the picture; view 0 is the plain one where there is such a thing."""

    def __call__(self, image: Image.Image, draws: AnyDraws) -> Image.Image:
        return self.view(image, draw_view(self.views, draws))


def draw_view(views: int, draws: AnyDraws) -> int:
    """Which view one sample's draws choose; data sets and caches share it, so both choose the same."""
    return int(draws.integers("view", views)) if views > 1 else 0


@dataclass(frozen=True)
class CenterCrop(Views):
    """ADM's centre crop; with `flip` also its mirror image, each half of the time (MAR family).

    Args:
        image_size: (height, width), or one number for a square.
        flip: whether the mirrored picture is a second view.
    """

    image_size: Size
    _: KW_ONLY
    flip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size))

    @property
    def views(self) -> int:  # type: ignore[override]  # follows from the settings
        return 2 if self.flip else 1

    def view(self, image: Image.Image, number: int) -> Image.Image:
        image = center_crop(image, self.image_size)
        return ImageOps.mirror(image) if number == 1 else image


@dataclass(frozen=True)
class TenCrop(Views):
    """Four corners and the centre of a somewhat larger centre crop, and their mirror images (LlamaGen family).

    Args:
        image_size: (height, width), or one number for a square.
        ranges: size of the larger crop relative to `image_size`; each gives ten views. LlamaGen's class-conditional
            models were trained on 1.1 and 1.05 in equal parts, NAR and D-AR on 1.1 alone.
    """

    image_size: Size
    _: KW_ONLY
    ranges: tuple[float, ...] = (1.1, 1.05)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size))
        object.__setattr__(self, "ranges", tuple(float(value) for value in self.ranges))
        if not self.ranges or min(self.ranges) < 1:
            raise ValueError(f"ten-crop ranges must be at least 1 and not empty, got {self.ranges}.")

    @property
    def views(self) -> int:  # type: ignore[override]  # follows from the settings
        return 10 * len(self.ranges)

    def view(self, image: Image.Image, number: int) -> Image.Image:
        height, width = self.image_size
        scale = self.ranges[number // 10]
        larger = center_crop(image, (int(height * scale), int(width * scale)))
        return ten_crop(larger, list(self.image_size))[number % 10]


@dataclass(frozen=True)
class RandomCrop(Transform):
    """A window of `image_size` out of the picture at a random, somewhat larger size (ADM; LlamaGen's tokenizer).

    Args:
        image_size: (height, width), or one number for a square.
        fractions: smallest and largest share of the covered side that the window keeps, in (0, 1].
        flip: mirror half of the pictures.
    """

    image_size: Size
    _: KW_ONLY
    fractions: tuple[float, float] = (0.8, 1.0)
    flip: bool = True
    views = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size))
        object.__setattr__(self, "fractions", tuple(float(value) for value in self.fractions))
        if len(self.fractions) != 2 or not 0 < self.fractions[0] <= self.fractions[1] <= 1:
            raise ValueError(f"random-crop fractions must be 0 < smallest <= largest <= 1, got {self.fractions}.")

    def __call__(self, image: Image.Image, draws: AnyDraws) -> Image.Image:
        height, width = self.image_size
        smallest, largest = (math.ceil(height / fraction) for fraction in reversed(self.fractions))
        covered = smallest + int(draws.integers("crop_size", largest - smallest + 1))
        image = resize_to_cover(image, (covered, math.ceil(covered * width / height)))
        top = int(draws.integers("crop_top", image.height - height + 1))
        left = int(draws.integers("crop_left", image.width - width + 1))
        image = _window(image, self.image_size, top, left)
        return ImageOps.mirror(image) if self.flip and float(draws.uniform("flip")) < 0.5 else image


AUGMENTATIONS: dict[str, Callable[[Size], Transform]] = {
    "none": CenterCrop,
    "flip": lambda image_size: CenterCrop(image_size, flip=True),
    "ten_crop": TenCrop,
    "random_crop": RandomCrop,
}


def make_transform(augmentation: str | Transform, image_size: int | tuple[int, int]) -> Transform:
    """The transform of that name at that size; a transform of one's own is returned if its size agrees."""
    size = as_size(image_size)
    if isinstance(augmentation, str):
        if augmentation not in AUGMENTATIONS:
            raise unknown("augmentation", augmentation, AUGMENTATIONS)
        return AUGMENTATIONS[augmentation](size)
    if augmentation.image_size != size:
        raise ValueError(f"the transform makes pictures of {augmentation.image_size}, the data set wants {size}.")
    return augmentation
