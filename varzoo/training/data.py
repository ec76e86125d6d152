"""Data modules: what the steps of a run see, keyed by step so that resuming and sharding change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from varzoo.data import CachedTokens, LabelledImages, StepBatchSampler, build_cache
from varzoo.tokenizers.base import Tokenizer


class ImageData(pl.LightningDataModule):
    """Images for training a tokenizer.

    Args:
        train, heldout: the two splits.
        batch_size: images per step over all processes together.
        seed: the run's seed.
        num_workers: processes that load images.
    """

    def __init__(self, *, train: LabelledImages, heldout: LabelledImages, batch_size: int, seed: int,
                 num_workers: int) -> None:
        super().__init__()
        self.train, self.heldout = train, heldout
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    def train_set(self) -> Dataset:
        return self.train

    def heldout_set(self) -> Dataset:
        return self.heldout

    def train_dataloader(self) -> DataLoader[Any]:
        dataset, trainer = self.train_set(), self.trainer
        sampler = StepBatchSampler(length=len(dataset), batch_size=self.batch_size, seed=self.seed,
                                   rank=trainer.global_rank, world_size=trainer.world_size,
                                   start_step=trainer.lightning_module.iteration)
        return self._loader(dataset, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset = self.heldout_set()
        shard = None
        if self.trainer.world_size > 1:
            shard = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return self._loader(dataset, batch_size=self.batch_size // self.trainer.world_size, sampler=shard)

    def _loader(self, dataset: Dataset, **settings: Any) -> DataLoader[Any]:
        return DataLoader(dataset, num_workers=self.num_workers, persistent_workers=self.num_workers > 0,
                          pin_memory=self.trainer.strategy.root_device.type == "cuda", **settings)


class TokenData(ImageData):
    """Cached tokens for training a generator; the caches are built first, by all processes together.

    Args:
        tokenizer: whose tokens.
        cache: folder of the caches, one sub-folder per split.
        copies: (height, width) of copies of every image at other sizes, by name, whose tokens a batch holds too.
        settings: see ImageData.
    """

    def __init__(self, *, tokenizer: Tokenizer, cache: Path, copies: Mapping[str, Sequence[int]] | None,
                 **settings: Any) -> None:
        super().__init__(**settings)
        self.tokenizer, self.cache, self.copies = tokenizer, cache, copies

    def setup(self, stage: str) -> None:
        """Build the caches, each process its share, on its device; all must see the folder."""
        trainer = self.trainer
        self.tokenizer.to(trainer.strategy.root_device)
        for split, dataset in (("train", self.train), ("heldout", self.heldout)):
            build_cache(self.cache / split, tokenizer=self.tokenizer, dataset=dataset, copies=self.copies,
                        num_workers=self.num_workers, rank=trainer.global_rank, world_size=trainer.world_size)
        trainer.strategy.barrier()

    def train_set(self) -> Dataset:
        return CachedTokens(folder=self.cache / "train", tokenizer=self.tokenizer, seed=self.seed)

    def heldout_set(self) -> Dataset:
        return CachedTokens(folder=self.cache / "heldout", tokenizer=self.tokenizer, seed=self.seed)
