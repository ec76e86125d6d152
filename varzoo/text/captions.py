"""Prompts as token ids, for generators that embed text themselves (RQ-Transformer's captions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varzoo.generators.base import Condition
from varzoo.text.cleaning import cleaning
from varzoo.text.extra import require
from varzoo.text.prompts import shortened


@dataclass(frozen=True, kw_only=True)
class CaptionIds:
    """Token ids `[B, T]` int64 of B prompts, padded behind."""

    ids: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def condition(self, rows: Tensor) -> Condition:
        """The condition of some rows `[b]`, any number of times each."""
        return Condition.captions(self.ids[rows.to(self.ids.device)])


class CaptionTokenizer:
    """A vocabulary of text tokens; there are no weights.

    Args:
        source: a `tokenizer.json` of the tokenizers package, or a folder that has one.
        length: tokens per prompt, padding included.
        padding: the token that fills up behind.
        clean: "lowercase", "captions" or "none", see `varzoo.text.cleaning`.
        truncate: cut prompts of more than `length` tokens; else they are refused.

    Raises:
        ImportError: tokenizers is not installed.
        FileNotFoundError: the file is not there.
        ValueError: it is no tokenizer, or does not know the padding token.
    """

    def __init__(self, *, source: str | Path | None, length: int, padding: str, clean: str, truncate: bool) -> None:
        self.clean, self.length, self.truncate = cleaning(clean), length, truncate
        if source is None:
            raise FileNotFoundError("this model's text tokenizer is not known to varzoo: give its file, as in "
                                    "text_encoder=tokenizer.json.")
        path = Path(source).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no text tokenizer at {path}: give a tokenizer.json of the tokenizers package.")
        try:
            self.tokenizer = require("tokenizers").Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more special
            if isinstance(error, ImportError):
                raise
            raise ValueError(f"{path} is no tokenizer of the tokenizers package ({error}).") from error
        self.padding = self.tokenizer.token_to_id(padding)
        if self.padding is None:
            raise ValueError(f"{path} knows no token {padding!r} to pad with: name another, as in text.padding=TOKEN.")

    def encode(self, prompts: Sequence[str]) -> CaptionIds:
        """Ids of prompts, in their order.

        Raises:
            ValueError: a prompt has more than `length` tokens (and `truncate` is off), or there is none.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list, got the single string {prompts!r}.")
        if not prompts:
            raise ValueError("no prompts were given.")
        ids = torch.full((len(prompts), self.length), self.padding)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(self.clean(prompt)).ids
            if len(tokens) > self.length and not self.truncate:
                raise ValueError(f"prompt {row} ({shortened(prompt)!r}) has {len(tokens)} tokens, at most "
                                 f"{self.length} fit: shorten it, or let it be cut (text.truncate=true).")
            tokens = tokens[:self.length]
            ids[row, :len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return CaptionIds(ids=ids, prompts=tuple(prompts))
