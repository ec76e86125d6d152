"""Draw images: `python sample.py checkpoint=runs/digits_llamagen guidance=3`."""

from varzoo.cli.sample import main

if __name__ == "__main__":
    main()
