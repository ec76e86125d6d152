"""Files that several processes may make at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def create_once(path: Path, write: Callable[[Path], object]) -> None:
    """Create a file with `write` unless it exists; of several processes one succeeds, and none sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".creating-") as folder:
        write(Path(folder) / path.name)
        with contextlib.suppress(FileExistsError):
            os.link(Path(folder) / path.name, path)
