"""Prompts to what generators are conditioned on: features of a frozen encoder, or token ids."""

from varzoo.text.cache import cached_features, class_features
from varzoo.text.captions import CaptionIds, CaptionTokenizer
from varzoo.text.encoder import TextEncoder
from varzoo.text.features import TextFeatures, load_features, save_features
from varzoo.text.prompts import class_prompts, read_prompts, shortened

__all__ = ["CaptionIds", "CaptionTokenizer", "TextEncoder", "TextFeatures", "cached_features", "class_features",
           "class_prompts", "load_features", "read_prompts", "save_features", "shortened"]
