"""A frozen T5 encoder: prompts to padded features, as LlamaGen (arXiv 2406.06525) and NAR (arXiv 2503.10696) make them.

A prompt is cleaned (see `varzoo.text.cleaning`), tokenized with its end token, padded behind to a fixed length and
encoded. Only then are the features of a left-padded system rolled to the end of the row: the encoder itself always sees
padding behind. Features at padding are zero.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from varzoo.core.checkpoint import weights_hash
from varzoo.core.errors import unknown
from varzoo.text.cleaning import cleaning
from varzoo.text.extra import require
from varzoo.text.features import TextFeatures
from varzoo.text.prompts import shortened

PADDING_SIDES = ("left", "right")


class TextEncoder(nn.Module):
    """T5's encoder and tokenizer. Weights are loaded in float32, on the CPU; `to` moves them as with any module.

    Args:
        source: folder with weights and tokenizer as transformers keeps them, or a name on the Hugging Face hub.
        download: whether a hub name may be downloaded; if not, it must be in the hub's local cache.
        length: tokens per prompt, the end token and padding included.
        channels: of the features; weights of another width are refused.
        padding_side: where padding stands in the features, "left" or "right".
        clean: "captions" (the official cleaning, twice), "lowercase" or "none".
        truncate: cut prompts of more than `length` tokens, as the official code does silently; else they are refused.

    Raises:
        ImportError: transformers (or for "captions" ftfy or beautifulsoup4) is not installed.
        FileNotFoundError: the weights are not there, or could not be downloaded.
        ValueError: they are not a whole T5 encoder of this width, or an option is unknown.
    """

    def __init__(self, *, source: str | Path, download: bool, length: int, channels: int, padding_side: str, clean: str,
                 truncate: bool) -> None:
        super().__init__()
        if padding_side not in PADDING_SIDES:
            raise unknown("padding_side", padding_side, PADDING_SIDES)
        self.clean = cleaning(clean)
        self.clean("")  # a package that it lacks is missed here, not after the weights are loaded
        self.source, self.length = str(source), length
        self.settings = {"length": length, "channels": channels, "padding_side": padding_side, "clean": clean,
                         "truncate": truncate}
        self.model: Any
        self.tokenizer, self.model = _load(self.source, download)
        if self.model.config.d_model != channels:
            raise ValueError(f"text encoder {self.source} makes features of {self.model.config.d_model} channels, "
                             f"expected {channels}: choose the encoder that the generator was trained with.")

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode: a frozen encoder inside a module that trains must not drop anything."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """What decides the features: settings, dtype and a hash of weights and vocabulary, beside the name."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        digest = hashlib.sha256((weights_hash(self.model.state_dict()) + vocabulary).encode())
        return {"name": self.source, "hash": digest.hexdigest()[:16], "dtype": str(self.model.dtype), **self.settings}

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids `[B, length]`, padded behind, and which of them are valid `[B, length]`.

        Raises:
            ValueError: a prompt has more than `length` tokens (and `truncate` is off).
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list, got the single string {prompts!r}.")
        truncate = self.settings["truncate"]
        ids = torch.full((len(prompts), self.length), self.tokenizer.pad_token_id)
        counts = torch.zeros(len(prompts), 1, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer(self.clean(prompt), truncation=truncate, verbose=False,
                                    max_length=self.length if truncate else None).input_ids
            if len(tokens) > self.length:
                raise ValueError(
                    f"prompt {row} ({shortened(prompt)!r}) has {len(tokens)} tokens, at most {self.length} fit: "
                    "shorten it, or let it be cut as in the official code (text.truncate=true).")
            ids[row, :len(tokens)], counts[row] = torch.tensor(tokens), len(tokens)
        return ids, torch.arange(self.length) < counts

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 32) -> TextFeatures:
        """Features of prompts, in their order, in the dtype of the weights, on the CPU.

        Raises:
            ValueError: a prompt has too many tokens, or there is none.
        """
        ids, valid = self.tokenize(prompts)
        if not len(ids):
            raise ValueError("no prompts were given.")
        device = self.model.device
        batches = zip(ids.to(device).split(batch_size), valid.to(device).split(batch_size))
        hidden = torch.cat([self.model(input_ids=part, attention_mask=mask).last_hidden_state.cpu()
                            for part, mask in batches])
        if self.settings["padding_side"] == "left":
            origin = (torch.arange(self.length) + valid.sum(1, keepdim=True)) % self.length
            hidden = hidden.gather(1, origin[..., None].expand_as(hidden))
            valid = valid.flip(1)
        return TextFeatures(features=hidden.masked_fill(~valid[..., None], 0), mask=valid, prompts=tuple(prompts))


def _load(source: str, download: bool) -> tuple[Any, nn.Module]:
    """Tokenizer and encoder in eval mode, frozen."""
    transformers = require("transformers")
    place = _locate(source, download)
    try:
        model, report = transformers.T5EncoderModel.from_pretrained(place, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{place} holds no complete text encoder ({reason}); it must have config.json, weights and tokenizer."
            if isinstance(place, Path) else
            f"text encoder {source} could not be fetched from the Hugging Face hub ({reason}). Without a network, copy "
            "its files into a folder and name that, as in text_encoder=FOLDER.") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{source} is not a whole T5 encoder: {len(missing)} weights are missing "
                         f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}).")
    return tokenizer, model.float().requires_grad_(False).eval()


def _locate(source: str, download: bool) -> Path | str:
    """The folder that holds the encoder, or its hub name where it may be downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"no text encoder at {source}: give the folder with its config.json, weights and "
                                "tokenizer, or a name on the Hugging Face hub such as google/flan-t5-xl.")
    if download:
        return source
    cached = try_to_load_from_cache(source, "config.json")  # a look at the disk: no request is made
    if not isinstance(cached, str):
        raise FileNotFoundError(
            f"text encoder {source} is not in the local cache of the Hugging Face hub, and nothing is downloaded that "
            f"you did not name: text_encoder={source} downloads it, text_encoder=FOLDER takes a copy.")
    return Path(cached).parent
