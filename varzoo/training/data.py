"""Data modules: what the steps of a run see, keyed by step so that resuming and sharding change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, DistributedSampler

from varzoo.data import CachedTokens, LabelledImages, StepBatchSampler, build_cache
from varzoo.tokenizers.base import Tokenizer
from varzoo.training.module import ours


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

    @property
    def run(self) -> pl.Trainer:
        """The trainer that asks."""
        assert self.trainer is not None
        return self.trainer

    def train_set(self) -> LabelledImages | CachedTokens:
        return self.train

    def heldout_set(self) -> LabelledImages | CachedTokens:
        return self.heldout

    def train_dataloader(self) -> DataLoader[Any]:
        dataset, run = self.train_set(), self.run
        sampler = StepBatchSampler(length=len(dataset), batch_size=self.batch_size, seed=self.seed,
                                   rank=run.global_rank, world_size=run.world_size,
                                   start_step=ours(run.lightning_module).iteration)
        return self._loader(dataset, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset, run = self.heldout_set(), self.run
        shard: DistributedSampler[Any] | None = None
        if run.world_size > 1:
            shard = DistributedSampler(dataset, run.world_size, run.global_rank, shuffle=False)
        return self._loader(dataset, batch_size=self.batch_size // run.world_size, sampler=shard)

    def _loader(self, dataset: LabelledImages | CachedTokens, **settings: Any) -> DataLoader[Any]:
        return DataLoader(dataset, num_workers=self.num_workers, persistent_workers=self.num_workers > 0,
                          pin_memory=self.run.strategy.root_device.type == "cuda", **settings)


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
        run = self.run
        self.tokenizer.to(run.strategy.root_device)
        for split, dataset in (("train", self.train), ("heldout", self.heldout)):
            build_cache(self.cache / split, tokenizer=self.tokenizer, dataset=dataset, copies=self.copies,
                        num_workers=self.num_workers, rank=run.global_rank, world_size=run.world_size)
        run.strategy.barrier()

    def train_set(self) -> CachedTokens:
        return CachedTokens(folder=self.cache / "train", tokenizer=self.tokenizer, seed=self.seed)

    def heldout_set(self) -> CachedTokens:
        return CachedTokens(folder=self.cache / "heldout", tokenizer=self.tokenizer, seed=self.seed)
