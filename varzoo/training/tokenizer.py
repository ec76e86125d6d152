"""Training a tokenizer: reconstruction against an optional adversary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from varzoo.core.losses import Losses
from varzoo.nn.processes import means_over_processes
from varzoo.tokenizers.base import Tokenizer
from varzoo.training.module import TrainingModule
from varzoo.training.reconstruction import ReconstructionObjective
from varzoo.training.sharding import average_gradients


class TokenizerTraining(TrainingModule[Tokenizer]):
    """Teaches a tokenizer to reconstruct images; the adversary, if there is one, takes its turn after every step.

    Args:
        tokenizer: the model.
        objective: what compares reconstruction and original; None where the tokenizer's own losses are all.
        clip: largest gradient norm of either side.
        settings: see TrainingModule.
    """

    entry = "reconstruction_losses"

    def __init__(self, *, tokenizer: Tokenizer, objective: ReconstructionObjective | None, clip: float | None,
                 **settings: Any) -> None:
        super().__init__(model=tokenizer, **settings)
        if tokenizer.needs_objective != (objective is not None):
            choice = "an objective, such as objective=pixels" if tokenizer.needs_objective else "objective=null"
            raise ValueError(f"{type(tokenizer).__name__} is trained with {choice}.")
        self.objective, self.clip = objective, clip
        self.automatic_optimization = False
        self._reconstructions: Tensor | None = None

    @property
    def adversary(self) -> torch.nn.Module | None:
        return None if self.objective is None else self.objective.discriminator

    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        images = batch["image"]
        reconstructions, bottleneck = self.model.reconstruction_losses(images, self.draws(batch["index"]))
        if self.objective is None:
            return bottleneck
        assert reconstructions is not None, "a tokenizer that needs an objective gives what that judges"
        self._reconstructions = reconstructions  # the adversary's turn comes after the step
        last_weight = self.model.last_decoder_weight() if self.objective.adaptive else None
        return self.objective.generator_losses(images, reconstructions, bottleneck, self.iteration, last_weight)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizer, *rest = optimizers if isinstance(optimizers, list) else [optimizers]
        if self.adversary is not None:
            self.adversary.requires_grad_(False)
        self._step(optimizer, self.compute(batch))
        self.follow()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LRScheduler), "the tokenizer's alone; the adversary's rate is constant"
        schedule.step()
        if self.adversary is not None:
            assert self.objective is not None and self._reconstructions is not None  # `losses` has just made them
            self.adversary.requires_grad_(True)
            losses = self.objective.discriminator_losses(batch["image"], self._reconstructions, self.iteration)
            means = means_over_processes(losses.parts)
            self.log_dict({f"train/{name}": value for name, value in means.items()})
            # Lightning counts the steps of its own optimizers; the run is as long as the tokenizer's alone.
            self._step(rest[0].optimizer, losses)
        self._reconstructions = None
        self.iteration += 1

    def _step(self, optimizer: Any, losses: Losses) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(losses.total)
        if self.sharded:  # the adversary is not
            average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers, schedules = super().configure_optimizers()
        if self.adversary is not None:
            optimizers.append(self.optimizer(self.adversary.parameters()))
        return optimizers, schedules

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for name in self._frozen():
            checkpoint["state_dict"].pop(name, None)  # sharded, only the first process has any

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"] |= self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        """The perceptual network's weights: half a gigabyte that no checkpoint needs."""
        return {name: value for name, value in self.state_dict().items() if name.startswith("objective.perceptual.")}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Mean squared error of the averaged weights' reconstructions of held-out images."""
        images = batch["image"]
        decoded = self.averaged.decode(self.averaged.encode(images), self.draws(batch["index"], iteration=0))
        error = F.mse_loss(decoded, images)
        self.log("heldout/mse", error, batch_size=len(images), sync_dist=True)
