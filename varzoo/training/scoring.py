"""Scores of a generator while it is trained, by the code that scores finished samples."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from varzoo.core.draws import Draws
from varzoo.data import LabelledImages
from varzoo.eval.features import FeatureExtractor
from varzoo.eval.protocol import append_row, result_row
from varzoo.eval.references import Reference
from varzoo.eval.score import Samples, Scorer, dataset_samples, make_protocol, reference_statistics
from varzoo.generators.base import Condition
from varzoo.samplers.base import Sampler
from varzoo.training.callbacks import EverySteps
from varzoo.training.generator import GeneratorTraining
from varzoo.training.module import TrainingModule


class ScoreSamples(EverySteps):
    """Draws class-conditional samples of the averaged weights, each process its share, and scores them all.

    Values are logged as `scores/NAME`, and a row with its protocol is appended to `path`.

    Args:
        every: steps between two scores.
        path: of the rows.
        sampler: how to draw.
        extractor: whose features are compared.
        dataset: the images that samples are compared with: those that are trained on.
        per_class: samples per class; the same draws every time.
        batch_size: images drawn at once.
        splits: splits of the inception score.
    """

    everywhere = True

    def __init__(self, *, every: int, path: Path, sampler: Sampler, extractor: FeatureExtractor,
                 dataset: LabelledImages, per_class: int, batch_size: int, splits: int) -> None:
        super().__init__(every)
        self.path, self.sampler, self.extractor, self.dataset = path, sampler, extractor, dataset
        self.per_class, self.batch_size, self.splits = per_class, batch_size, splits
        self._reference: Reference | None = None  # measured when it is first needed

    def show(self, module: TrainingModule[Any], device: torch.device) -> None:
        assert isinstance(module, GeneratorTraining)
        begun, trainer = time.perf_counter(), module.trainer
        extractor = self.extractor.to(device)
        if self._reference is None:
            shares = dataset_samples(self.dataset, rank=trainer.global_rank, world_size=trainer.world_size)
            self._reference = reference_statistics(
                shares, extractor=extractor, name=f"{self.dataset.name}, {self.dataset.split} split",
                kind="train" if self.dataset.split == "train" else "images", distributed=trainer.world_size > 1)
        labels = torch.arange(self.dataset.num_classes).repeat_interleave(self.per_class)
        scorer = Scorer(extractor=extractor, count=len(labels), splits=self.splits)
        tokenizer = module.tokenizer.to(device)
        for rows in torch.arange(trainer.global_rank, len(labels), trainer.world_size).split(self.batch_size):
            draws = Draws(module.seed, tuple(rows.tolist()), device)
            tokens = self.sampler.sample(module.averaged, Condition.classes(labels[rows]).to(device), draws).tokens
            scorer.update(Samples(tokenizer.to_uint8(tokenizer.decode(tokens, draws)), labels[rows], rows))
        if trainer.world_size > 1:
            scorer.all_reduce()
        if trainer.is_global_zero:
            scores = scorer.scores(self._reference)
            protocol = make_protocol(
                extractor=extractor, count=len(labels), reference=self._reference, splits=self.splits,
                labels=f"{self.per_class} per label, sorted", uint8_rule=tokenizer.uint8_rule,
                image_size=tokenizer.image_size)
            append_row(self.path, result_row(protocol, asdict(scores), seconds=time.perf_counter() - begun,
                                             run={"step": module.iteration, "seed": module.seed}))
            named = {protocol.metric: scores.fd, "inception_score": scores.inception_score, "accuracy": scores.accuracy}
            for logger in trainer.loggers:
                logger.log_metrics({f"scores/{name}": value for name, value in named.items() if value is not None},
                                   step=module.iteration)
