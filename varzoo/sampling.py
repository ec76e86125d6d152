"""Drawing many images in batches: which images, in what order, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from varzoo.eval.previews import write_previews
from varzoo.eval.score import Samples
from varzoo.generators.base import Condition
from varzoo.loading import Model
from varzoo.rejection import Rejection


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw: one entry per image, of labels or text.

    Args:
        labels: class of every image; None for an unconditional model or text.
        features: `[count, T, C]` text features with `mask` `[count, T]`.
        ids: `[count, T]` text token ids, for generators that embed text themselves.
        prompts: the prompt of every image, where it is known.
        count: number of images where there is none of these.
    """

    labels: Sequence[int] | None = None
    features: Tensor | None = None
    mask: Tensor | None = None
    ids: Tensor | None = None
    prompts: Sequence[str] = ()
    count: int = 0

    def __len__(self) -> int:
        given = [entries for entries in (self.labels, self.features, self.ids) if entries is not None]
        return len(given[0]) if given else self.count

    def condition(self, indices: Sequence[int]) -> Condition:
        """The condition of some of the images."""
        if self.labels is not None:
            return Condition.classes(torch.tensor([self.labels[index] for index in indices]))
        if self.features is not None and self.mask is not None:
            return Condition.text(self.features[list(indices)], self.mask[list(indices)])
        if self.ids is not None:
            return Condition.captions(self.ids[list(indices)])
        return Condition.nothing(len(indices))


def draw(model: Model, request: Request, *, seed: int, batch_size: int, indices: Sequence[int] | None = None,
         previews: Path | None = None, rejection: Rejection | None = None,
         progress: bool = True) -> Iterator[Samples]:
    """Draw the images of a request, or those of `indices`; an image depends on seed and index, never on the batch.

    With `rejection`, several candidates are drawn for every image and the best is kept.

    With `previews`, what each image looked like while its tokens came is written to that folder (`write_previews`).
    """
    indices = list(range(len(request)) if indices is None else indices)
    if rejection is not None:
        if previews is not None:
            raise ValueError("previews show every image while it is drawn, and rejection draws many that are not kept: "
                             "leave one of the two out.")
        rejection.check(request.labels)
        yield from _draw_best(model, request, indices, rejection, seed=seed, batch_size=batch_size, progress=progress)
        return
    with tqdm(total=len(indices), desc="sampling", unit="image", disable=not progress) as bar:
        for start in range(0, len(indices), batch_size):
            part = indices[start:start + batch_size]
            steps = 0

            def show(_: object) -> None:
                nonlocal steps
                steps += 1
                bar.set_postfix(step=steps)

            shown: list[Tensor] = []
            keep = shown.append
            images, _ = model.sample(request.condition(part), seed=seed, samples=part, callback=show,
                                     preview=None if previews is None else keep)
            if previews is not None:
                write_previews(previews, torch.stack(shown, dim=1).cpu(), part)
            labels = None if request.labels is None else torch.tensor([request.labels[index] for index in part])
            bar.update(len(part))
            yield Samples(images.cpu(), labels, torch.tensor(part))


def _draw_best(model: Model, request: Request, indices: Sequence[int], rejection: Rejection, *, seed: int,
               batch_size: int, progress: bool) -> Iterator[Samples]:
    """The best candidate of every image; a batch holds all candidates of as many images as fit, of one at least."""
    count, wanted = max(1, batch_size // rejection.candidates), request.labels
    assert wanted is not None, "rejection is for class-conditional models"
    with tqdm(total=len(indices), desc="sampling", unit="image", disable=not progress) as bar:
        for start in range(0, len(indices), count):
            part = indices[start:start + count]
            candidates = [(index, sample) for index in part for sample in rejection.of(index)]
            images, labels = [], torch.tensor([wanted[index] for index, _ in candidates])
            for first in range(0, len(candidates), batch_size):
                rows, samples = zip(*candidates[first:first + batch_size])
                images.append(model.sample(request.condition(rows), seed=seed, samples=samples)[0])
            best = rejection.best(torch.cat(images), labels.to(images[0].device))
            bar.update(len(part))
            yield Samples(best.cpu(), labels[::rejection.candidates], torch.tensor(part))
