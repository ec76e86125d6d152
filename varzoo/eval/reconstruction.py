"""Scores of reconstructions against their originals: PSNR, SSIM, LPIPS, and how much of a codebook is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from varzoo.eval.moments import SampleSet
from varzoo.eval.similarity import psnr, ssim


class PairScores:
    """Streaming means over pairs of a reconstruction and its original, per image and then over images.

    Args:
        count: number of pairs in the whole set; an index beyond it is padding.
        lpips: images `[B, 3, H, W]` in [-1, 1], twice -> distances `[B]`; None leaves LPIPS out.
        window, data_range: of SSIM, see `ssim`.
    """

    def __init__(self, *, count: int, lpips: Callable[[Tensor, Tensor], Tensor] | None, window: str = "uniform",
                 data_range: float = 1.0) -> None:
        self.samples, self.lpips, self.window, self.data_range = SampleSet(count), lpips, window, data_range
        self.names = ("psnr", "ssim") if lpips is None else ("psnr", "ssim", "lpips")
        self.sums = torch.zeros(len(self.names), dtype=torch.float64)

    @torch.no_grad()
    def update(self, reconstructions: Tensor, originals: Tensor, index: Tensor) -> None:
        """Add pairs of uint8 images `[B, 3, H, W]` under their indices `[B]`. Raises ValueError if they do not pair."""
        if reconstructions.shape != originals.shape:
            raise ValueError(f"reconstructions {list(reconstructions.shape)} and originals {list(originals.shape)} do "
                             "not "
                             "pair; give both from one data set, in one size and order.")
        fresh = self.samples.fresh(index)
        pair = [images[fresh.to(images.device)].float() / 255 for images in (reconstructions, originals)]
        values = [psnr(*pair), ssim(*pair, window=self.window, data_range=self.data_range)]
        if self.lpips is not None:
            values.append(self.lpips(2 * pair[0] - 1, 2 * pair[1] - 1))
        self.sums += torch.stack([value.double().sum().cpu() for value in values])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the sums by those over all processes."""
        self.samples.all_reduce(group)
        dist.all_reduce(self.sums, group=group)

    def result(self) -> dict[str, float]:
        """The means by name. Raises ValueError unless every pair has come."""
        if len(self.samples) != self.samples.count:
            raise ValueError(f"{self.samples.count} pairs are to be scored, {len(self.samples)} came.")
        return dict(zip(self.names, (self.sums / self.samples.count).tolist()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.samples.seen.clone(), "sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.seen = state["seen"].clone()
        self.sums.copy_(state["sums"])


class CodebookUsage:
    """How often each code was used over a set of images.

    Args:
        size: number of codes K.
        count: number of images in the whole set; an index beyond it is padding.
    """

    def __init__(self, *, size: int, count: int) -> None:
        self.samples = SampleSet(count)
        self.times = torch.zeros(size, dtype=torch.int64)

    def update(self, ids: Tensor, index: Tensor) -> None:
        """Add the ids `[B, ...]` of images under their indices `[B]`. Raises ValueError for an id that is no code."""
        ids = ids[self.samples.fresh(index).to(ids.device)].flatten().cpu()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.times):
            raise ValueError(f"ids must lie in 0 .. {len(self.times) - 1}, got {int(ids.min())} .. {int(ids.max())}.")
        self.times += ids.bincount(minlength=len(self.times))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the counts by those over all processes."""
        self.samples.all_reduce(group)
        dist.all_reduce(self.times, group=group)

    def result(self) -> dict[str, float]:
        """Share of the codes that were used at all, and exp of the entropy of their use."""
        share = self.times.double() / self.times.sum()
        return {"codebook_usage": float((self.times > 0).double().mean()),
                "codebook_perplexity": float((-torch.xlogy(share, share).sum()).exp())}

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.samples.seen.clone(), "times": self.times.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.seen = state["seen"].clone()
        self.times.copy_(state["times"])
