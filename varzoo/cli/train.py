"""Train a tokenizer or a generator: `python train.py experiment=digits_mar seed=1`.

What trains is imported once it is called for: --help needs none of it.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="pkg://varzoo.configs", config_name="train", version_base="1.3")
def _run(config: DictConfig) -> None:
    from varzoo.training.run import train

    try:
        folder = train(config)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"run: {folder}")


def main() -> None:
    _run()


if __name__ == "__main__":
    main()
