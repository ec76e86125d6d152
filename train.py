"""Train a tokenizer or a generator: `python train.py`, `python train.py experiment=digits_mar`."""

from varzoo.cli.train import main

if __name__ == "__main__":
    main()
