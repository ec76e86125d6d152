"""Where prompts come from: a file with one per line, or the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, or is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}: give a text file with one prompt per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8, one prompt per line.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one per line.")
    return prompts


def class_prompts(class_names: Sequence[str], template: str) -> list[str]:
    """A prompt per class: the template with `{}` replaced by the class's name, as in "a handwritten digit {}"."""
    if "{}" not in template:
        raise ValueError(f"template {template!r} must contain {{}} where the class's name goes.")
    return [template.replace("{}", name) for name in class_names]


def shortened(prompt: str, width: int = 40) -> str:
    """A prompt in at most `width` characters."""
    return prompt if len(prompt) <= width else prompt[:width - 3].rstrip() + "..."
