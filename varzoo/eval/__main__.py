"""`python -m varzoo.eval`: see `varzoo.cli.evaluate`. Only an entry point; the package itself imports no command."""

from __future__ import annotations

import sys

from varzoo.cli.evaluate import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run(sys.argv[1:])
