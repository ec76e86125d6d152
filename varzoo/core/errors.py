"""Messages that say what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, value: object, options: Iterable[object]) -> ValueError:
    """Build the error for a `value` that is none of `options`, naming the nearest valid choice first."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {value!r}.{hint} Choose from: {', '.join(names) or '(none)'}.")
