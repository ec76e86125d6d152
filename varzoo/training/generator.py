"""Training a generator on the tokens of a frozen tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varzoo.core.losses import Losses
from varzoo.generators.base import Batch, Condition, Generator
from varzoo.tokenizers.base import Tokenizer
from varzoo.training.module import TrainingModule

GIVEN = {"compressed", "label", "index"}  # what every cached batch has; anything else is handed on as extras


class GeneratorTraining(TrainingModule):
    """Teaches a generator what the tokens of a data set look like.

    Args:
        generator: the model.
        tokenizer: turns cached compressions into tokens; not trained and not part of the checkpoints.
        posterior: draw tokens from the tokenizer's posterior anew at every iteration, instead of taking its mean.
        settings: see TrainingModule.
    """

    def __init__(self, *, generator: Generator, tokenizer: Tokenizer, posterior: bool, **settings: Any) -> None:
        super().__init__(model=generator, **settings)
        self.posterior = posterior
        # In a tuple the tokenizer is no submodule, so that it is neither trained, averaged nor saved.
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer[0]

    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        draws = self.draws(batch["index"])
        with torch.no_grad():
            tokens = self.tokenizer.tokens(batch["compressed"], draws if self.posterior else None)
        extras = {name: value for name, value in batch.items() if name not in GIVEN}
        return self.model.loss(Batch(tokens=tokens, condition=Condition.classes(batch["label"]), extras=extras),
                               draws, self.progress)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.compute(batch)
        self.iteration += 1
        return losses.total

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The loss of the averaged weights on held-out images, with the same draws at every validation."""
        draws = self.draws(batch["index"], iteration=0)
        tokens = self.tokenizer.tokens(batch["compressed"])
        batch_ = Batch(tokens=tokens, condition=Condition.classes(batch["label"]))
        self.log("heldout/loss", self.averaged.loss(batch_, draws, 1.0).total, batch_size=len(tokens), sync_dist=True)
