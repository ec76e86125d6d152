"""Draw images: `python sample.py checkpoint=runs/digits_llamagen guidance=3 labels=[3,7]`.

What draws them is imported once it is called for: --help needs none of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="pkg://varzoo.configs", config_name="sample", version_base="1.3")
def _run(config: DictConfig) -> None:
    from varzoo.cli.drawing import sample

    try:
        print(f"samples: {sample(config)}")
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Let a checkpoint that knows its own model choose it, then run Hydra."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if "checkpoint" in given and not {"model", "generator"} & given.keys():
        from varzoo.loading import register_run

        try:
            checkpoint, tokenizer = register_run(Path(given["checkpoint"]), own_sampler="sampler" not in given)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        sys.argv += ["model=run"] + ([] if "tokenizer_checkpoint" in given else [f"tokenizer_checkpoint={tokenizer}"])
        sys.argv = [f"checkpoint={checkpoint}" if argument.startswith("checkpoint=") else argument
                    for argument in sys.argv]
    _run()


if __name__ == "__main__":
    main()
