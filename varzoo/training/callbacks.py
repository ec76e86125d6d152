"""What a run shows while it goes on: a progress bar, pictures, curves."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from varzoo.core.checkpoint import atomic_path
from varzoo.core.draws import Draws
from varzoo.data import LabelledImages
from varzoo.eval.writers import save_grid
from varzoo.generators.base import Condition
from varzoo.samplers.base import Sampler
from varzoo.training.generator import GeneratorTraining
from varzoo.training.module import TrainingModule, ours
from varzoo.training.tokenizer import TokenizerTraining


class StepBar(pl.Callback):
    """One progress bar over the steps of the whole run, wherever it was resumed; losses every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar = tqdm(total=ours(module).steps, initial=ours(module).iteration, desc="training", unit="step",
                        disable=trainer.global_rank > 0, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        iteration = ours(module).iteration
        self.bar.update(iteration - self.bar.n)
        if iteration % self.every == 0:
            metrics = trainer.callback_metrics
            shown = {name: f"{float(metrics[name]):.4g}" for name in ("train/loss", "heldout/loss", "heldout/mse")
                     if name in metrics}
            self.bar.set_postfix({name.replace("/", " "): value for name, value in shown.items()}, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class EverySteps(pl.Callback, ABC):
    """Calls `show` every so many steps and after the last: on rank zero, or `everywhere` at once."""

    everywhere: ClassVar[bool] = False

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        run = ours(module)
        if run.iteration % self.every == 0 or run.iteration == run.steps:
            was_training, device = run.training, run.device
            run.eval()
            with torch.no_grad(), run.whole():
                if self.everywhere or trainer.is_global_zero:
                    run.averaged.eval()
                    self.show(run, device)
            run.train(was_training)

    @abstractmethod
    def show(self, module: TrainingModule[Any], device: torch.device) -> None:
        """Write a picture; the module is in eval mode and no gradient is kept."""


class SampleGrid(EverySteps):
    """A grid of class-conditional samples of the averaged weights, one class per row, the same draws every time.

    Args:
        every: steps between two grids.
        folder: where the PNGs go.
        sampler: how to draw.
        class_names: one per class; the first ten are shown.
        columns: samples per class.
    """

    def __init__(self, *, every: int, folder: Path, sampler: Sampler, class_names: tuple[str, ...],
                 columns: int = 8) -> None:
        super().__init__(every)
        self.folder, self.sampler, self.columns = folder, sampler, columns
        self.class_names = class_names[:10]

    def show(self, module: TrainingModule[Any], device: torch.device) -> None:
        assert isinstance(module, GeneratorTraining)
        labels = torch.arange(len(self.class_names), device=device).repeat_interleave(self.columns)
        draws = Draws(module.seed, tuple(range(len(labels))), device)
        tokens = self.sampler.sample(module.averaged, Condition.classes(labels), draws).tokens
        images = module.tokenizer.to(device).to_uint8(module.tokenizer.decode(tokens, draws))
        save_grid(self.folder / f"step_{module.iteration:06d}.png", images, self.class_names)


class ReconstructionGrid(EverySteps):
    """Held-out originals (odd rows) above their reconstructions by the averaged weights (even rows)."""

    def __init__(self, *, every: int, folder: Path, dataset: LabelledImages, columns: int = 16, rows: int = 3) -> None:
        super().__init__(every)
        self.folder = folder
        spread = torch.linspace(0, len(dataset) - 1, columns * rows).long().tolist()
        self.images = torch.stack([dataset[index]["image"] for index in spread]).unflatten(0, (rows, columns))

    def show(self, module: TrainingModule[Any], device: torch.device) -> None:
        assert isinstance(module, TokenizerTraining)
        tokenizer = module.averaged
        rows: list[Tensor] = []
        draws = Draws(module.seed, tuple(range(self.images.shape[1])), device)
        for images in self.images.to(device):
            rows += [tokenizer.to_uint8(images), tokenizer.to_uint8(tokenizer.decode(tokenizer.encode(images), draws))]
        names = ("original", "decoded") * len(self.images)
        save_grid(self.folder / f"step_{module.iteration:06d}.png", torch.cat(rows), names)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All logged values by name as (step, value), over every resumption of a run; later ones win."""
    values: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        values.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(series.items()) for name, series in values.items()}


def plot_curves(path: Path, metrics: Mapping[str, list[tuple[int, float]]], title: str) -> None:
    """Draw the training and held-out losses over the steps."""
    from matplotlib.figure import Figure  # slow to import, and needed once per run

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in ("train/loss", "heldout/loss", "train/reconstruction", "heldout/mse"):
        if name in metrics:
            steps, values = zip(*metrics[name])
            axes.plot(steps, values, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
