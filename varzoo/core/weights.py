"""Weights of measuring networks, which others publish: where a file is looked for, and what is said when it is nowhere.

The order is: a path that is given, the folder `$VARZOO_WEIGHTS`, torch hub's cache, and a download where it is allowed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        file: its name.
        sha256: first digits of its sha256, None where they are not known.
        url: where it can be downloaded, None where only by hand.
        purpose: what needs it, for messages.
        origin: who publishes it, for messages.
    """

    file: str
    sha256: str | None
    url: str | None
    purpose: str
    origin: str

    def places(self) -> list[Path]:
        """Where the file is looked for if no path is given, the first preferred."""
        folder = os.environ.get("VARZOO_WEIGHTS")
        own = [Path(folder) / self.file] if folder else []
        return [*own, Path(torch.hub.get_dir()) / "checkpoints" / self.file]

    def find(self, given: str | Path | None = None, download: bool = False) -> Path:
        """The file's path. Raises FileNotFoundError naming the file, its hash and where to put it."""
        candidates = [Path(given)] if given else self.places()
        for path in candidates:
            if path.is_file():
                return path
        if download and not given and self.url is not None:
            target = self.places()[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(target), hash_prefix=self.sha256)
            return target
        known = f"its sha256 begins with {self.sha256}" if self.sha256 else "its sha256 is not known here"
        also = ", or allow download=true" if self.url else ""
        raise FileNotFoundError(
            f"no weights at {' or '.join(map(str, candidates))}. {self.purpose} needs {self.file} ({known}; "
            f"{self.origin} has it): give its path (weights=FILE), or put it into the folder $VARZOO_WEIGHTS{also}.")

    def is_published(self, path: str | Path) -> bool:
        """Whether the file at this path is the published one, as far as its hash is known."""
        return self.sha256 is not None and file_hash(path).startswith(self.sha256)


def file_hash(path: str | Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
