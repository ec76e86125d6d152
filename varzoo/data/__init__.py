"""Data sets, the batches of a training run, and caches of what a tokenizer makes of them."""

from varzoo.data.cache import CachedTokens, build_cache
from varzoo.data.datasets import Digits, FashionMNIST, ImageFolder, ImageNet, LabelledImages
from varzoo.data.sampler import Example, StepBatchSampler
from varzoo.data.transforms import CenterCrop, RandomCrop, TenCrop, Transform

__all__ = [
    "CachedTokens", "CenterCrop", "Digits", "Example", "FashionMNIST", "ImageFolder", "ImageNet", "LabelledImages",
    "RandomCrop", "StepBatchSampler", "TenCrop", "Transform", "build_cache",
]
