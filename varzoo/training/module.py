"""What training a tokenizer and training a generator have in common.

A run is a function of its seed and its step number: batches, draws and dropout are all keyed by the iteration, so that
a killed run, resumed from its last checkpoint, ends with the weights it would have had.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from varzoo.core.draws import Draws
from varzoo.core.losses import Losses
from varzoo.nn.processes import means_over_processes, sum_over_processes
from varzoo.training.optim import LearningRate, parameter_groups
from varzoo.training.sharding import FullySharded, follow_shards, named, place, shard, whole

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Network = TypeVar("Network", bound=nn.Module)


class TrainingModule(pl.LightningModule, ABC, Generic[Network]):
    """A model being trained, with its moving average.

    Args:
        model: the tokenizer or generator.
        optimizer: parameter groups -> optimizer (a partial of a torch.optim class).
        learning_rate: the factor of the learning rate at every step.
        steps: length of the run.
        seed: the run's seed.
        ema_decay: decay per step of the exponential moving average of the weights, None for none.
        folder: where a batch that gave a non-finite loss is kept.

    Attributes:
        entry: name of the model's method that computes its losses: where its weights are gathered, if they are sharded.
    """

    entry: ClassVar[str]

    model: Network

    def __init__(self, *, model: Network, optimizer: OptimizerFactory, learning_rate: LearningRate, steps: int,
                 seed: int, ema_decay: float | None, folder: Path) -> None:
        super().__init__()
        self.model = model
        self.ema: AveragedModel | None = None
        if ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)).requires_grad_(False)
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.steps, self.seed, self.folder = steps, seed, folder
        self.iteration = 0
        self._unhooked: tuple[Network, ...] = ()  # see `configure_model`; in a tuple it is no submodule
        self._gathered = contextlib.ExitStack()

    def configure_model(self) -> None:
        """Shard the model and its average, if the trainer says so."""
        if not self.sharded:
            return
        if self.ema is None:
            self._unhooked = (copy.deepcopy(self.model),)
        assert self.device_mesh is not None, "the strategy has made it before it configures models"
        shard(self.model, self.device_mesh["data_parallel"], entry=self.entry)
        if self.ema is not None:
            follow_shards(self.ema.module, self.model)

    @property
    def sharded(self) -> bool:
        return isinstance(self.trainer.strategy, FullySharded)

    @property
    def averaged(self) -> Network:
        """The weights to sample with: the moving average where there is one. Where sharded, see `whole`."""
        if self.ema is not None:
            return cast(Network, self.ema.module)  # a copy of the model
        return self._unhooked[0] if self._unhooked else self.model

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Meanwhile, the averaged weights are all here, sharded or not; every process must ask for them."""
        for module in self._unhooked:
            place(module, named(self.model) | dict(self.model.named_buffers()))
        with whole(self.averaged):
            yield

    @property
    def progress(self) -> float:
        return min(1.0, self.iteration / self.steps)

    def draws(self, indices: Tensor, iteration: int | None = None) -> Draws:
        """The draws of this iteration (or another) for the given dataset indices."""
        iteration = self.iteration if iteration is None else iteration
        return Draws(self.seed, tuple(indices.tolist()), self.device).keyed(iteration=iteration)

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        """The losses of a batch: a function of the weights, the batch and the iteration."""

    def compute(self, batch: Mapping[str, Tensor]) -> Losses:
        """The losses of this process's batch; their means over all processes are logged.

        Dropout is keyed by seed, iteration and rank. Raises FloatingPointError if the loss is not finite.
        """
        label = repr((self.seed, self.iteration, self.global_rank))
        torch.manual_seed(int.from_bytes(hashlib.blake2b(label.encode(), digest_size=7).digest(), "little"))
        losses = self.losses(batch)
        means = means_over_processes({"loss": losses.total, **losses.parts})
        if not torch.isfinite(means["loss"]):  # so all processes stop, or none
            raise FloatingPointError(self._report_nonfinite(losses, batch))
        self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=len(batch["index"]))
        return losses

    def follow(self) -> None:
        """Let the moving average follow a step of the optimizer."""
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW and kin over the decay groups of the model, the learning rate set per step."""
        decays = getattr(self.model, "decays", lambda name, parameter: parameter.ndim >= 2)
        optimizer = self.optimizer(parameter_groups(self.model, decays))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.follow()

    def on_validation_epoch_start(self) -> None:
        self._gathered.enter_context(self.whole())

    def on_validation_epoch_end(self) -> None:
        self._gathered.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["iteration"] = self.iteration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.iteration = checkpoint["iteration"]

    def _report_nonfinite(self, losses: Losses, batch: Mapping[str, Tensor]) -> str:
        mine = f"_rank{self.global_rank}" if self.global_rank else ""
        path = self.folder / f"nonfinite_step_{self.iteration:06d}{mine}.pt"
        torch.save({"iteration": self.iteration, "seed": self.seed, "batch": dict(batch)}, path)
        parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.parts.items())
        module = first_nonfinite_module(self.model, lambda: self.losses(batch))
        return (f"the loss became {losses.total.item()} at step {self.iteration} ({parts}). First to be not finite: "
                f"{module}. The batch is kept in {path}. Lower the learning rate, clip gradients, or train in float32.")


def ours(module: pl.LightningModule | None) -> TrainingModule[Any]:
    """A trainer's module, as what it is in every run of ours."""
    assert isinstance(module, TrainingModule)
    return module


def first_nonfinite_module(model: nn.Module, rerun: Callable[[], object]) -> str:
    """Name the module whose weights, or whose output on a rerun, are the first that are not finite."""
    parameters = dict(model.named_parameters())
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters.values()]
    bad = torch.stack([(~torch.isfinite(tensor)).any() for tensor in local]).float()
    for name, count in zip(parameters, sum_over_processes(bad).tolist()):  # the same answer on all processes
        if count:
            return f"weights of {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(tensor, Tensor) and not torch.isfinite(tensor).all() for tensor in tensors):
                found.append(name)
        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for handle in handles:
            handle.remove()
    return f"output of {found[0]}" if found else "the loss itself, after finite outputs of all modules"
