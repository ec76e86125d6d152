"""`python -m varzoo list`: the `varzoo` command."""

from varzoo.cli.zoo import main

if __name__ == "__main__":
    main()
