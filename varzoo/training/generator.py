"""Training a generator on the tokens of a frozen tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varzoo.core.draws import Draws
from varzoo.core.losses import Losses
from varzoo.generators.base import Batch, Condition, Generator
from varzoo.tokenizers.base import Tokenizer
from varzoo.training.module import TrainingModule

GIVEN = {"compressed", "label", "index", "copies"}  # what cached batches have; anything else is handed on as extras


class GeneratorTraining(TrainingModule[Generator]):
    """Teaches a generator what the tokens of a data set look like.

    Args:
        generator: the model.
        tokenizer: turns cached compressions into tokens; not trained and not part of the checkpoints.
        posterior: draw tokens from the tokenizer's posterior anew at every iteration, instead of taking its mean.
        settings: see TrainingModule.
    """

    entry = "loss"

    def __init__(self, *, generator: Generator, tokenizer: Tokenizer, posterior: bool, **settings: Any) -> None:
        super().__init__(model=generator, **settings)
        self.posterior = posterior
        # In a tuple the tokenizer is no submodule, so that it is neither trained, averaged nor saved.
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer[0]

    def losses(self, batch: Mapping[str, Any]) -> Losses:
        draws = self.draws(batch["index"])
        return self.model.loss(self.tokenized(batch, draws if self.posterior else None), draws, self.progress)

    @torch.no_grad()
    def tokenized(self, batch: Mapping[str, Any], draws: Draws | None) -> Batch:
        """A cached batch as tokens, drawn from the posterior if draws are given, then with the tokenizer's extras.

        Copies become extras by name.
        """
        extras = {name: value for name, value in batch.items() if name not in GIVEN}
        for number, (name, compressed) in enumerate(sorted(batch.get("copies", {}).items())):
            extras[name] = self.tokenizer.tokens(compressed, None if draws is None else draws.keyed(copy=number))
        tokens = self.tokenizer.tokens(batch["compressed"], draws)
        if draws is not None:
            extras |= self.tokenizer.extras(batch["compressed"], tokens)
        return Batch(tokens=tokens, condition=Condition.classes(batch["label"]), extras=extras)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses = self.compute(batch)
        self.iteration += 1
        return losses.total

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The loss of the averaged weights on held-out images, with the same draws at every validation."""
        draws = self.draws(batch["index"], iteration=0)
        loss = self.averaged.loss(self.tokenized(batch, None), draws, 1.0).total
        self.log("heldout/loss", loss, batch_size=len(batch["index"]), sync_dist=True)
