"""`python -m varzoo.eval`: see `varzoo.cli.evaluate`. Only an entry point; the package itself imports no command."""

from __future__ import annotations

import sys

from varzoo.cli.options import usage

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage())
    else:
        from varzoo.cli.evaluate import run  # what scores is slow to import, and help needs none of it

        run(sys.argv[1:])
