"""docs/adding_a_system.md, followed to the letter: a package of its own trains, samples and is listed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.doc_blocks import blocks_of, untrained_run

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding_a_system.md"
BRIEFLY = "steps=2 batch_size=8 samples_every=0 validate_every=2 +trainer.limit_val_batches=1"


def write_package(folder: Path) -> None:
    """The files of the page, each a block below its name, and the empty ones of its listing."""
    lines = PAGE.read_text().splitlines()
    for block in blocks_of(PAGE):
        named = re.fullmatch(r"<!-- file: (\S+) -->", lines[block.line - 2])
        if named:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    for name in ("mychain/__init__.py", "mychain/configs/__init__.py"):
        (folder / name).touch()


def test_a_system_outside_of_varzoo(tmp_path: Path) -> None:
    write_package(tmp_path)
    untrained_run(tmp_path / "runs", "digits_vq")
    (shell,) = (block.text for block in blocks_of(PAGE) if block.language == "bash")
    (python,) = (block.text for block in blocks_of(PAGE) if block.text.startswith("import varzoo"))
    assert shell.count("experiment=digits_chain") == 1
    script = shell.replace("experiment=digits_chain", f"experiment=digits_chain {BRIEFLY}")
    script = re.sub(r"^varzoo-(train|sample)", r"python -m varzoo.cli.\1", script, flags=re.MULTILINE)
    script = re.sub(r"^varzoo ", "python -m varzoo.cli.zoo ", script, flags=re.MULTILINE)
    (tmp_path / "load.py").write_text(f"{python}\nprint(images.shape, counts.steps)\n")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(["bash", "-e", "-c", script + "python load.py\n"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "run: runs/digits_chain" in done.stdout
    assert (tmp_path / "runs/digits_chain/samples/grid_seed0.png").is_file()
    printed = " ".join(done.stdout.split())
    assert "generators chain_tiny" in printed and "experiments digits_chain" in printed
    assert "generator chain_tiny: A Markov chain over raster-ordered ids" in printed
    assert "tokens discrete grid 8 x 8 of 128 codes" in printed and "tokenizers vq_f2" in printed
    assert "torch.Size([2, 3, 16, 16]) 64" in printed
