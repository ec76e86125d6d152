"""The contract of samplers: a loop over a decoding that knows the protocol and never a model's insides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.steps import Schedule, Step, options_of_phase
from varzoo.generators.base import Condition, Decoding, Generator


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a batch took: AR steps, evaluations of the backbone and of the head, seconds.

    An evaluation is one call of the network for the whole batch, whatever it is fed; a guided one, with its null half,
    counts once. Where one network is both (xAR), its calls are the head's and none are the backbone's.

    Samplers that draft also count the evaluations of the draft's network and, summed over samples, how often drafts
    were verified, how many drafted tokens (or cells) were tested, and how many accepted.
    """

    steps: int
    backbone_evaluations: int
    head_evaluations: int
    seconds: float
    draft_evaluations: int = 0
    verifications: int = 0
    tested: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the tests that accepted; nan without any."""
        return self.accepted / self.tested if self.tested else float("nan")

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verification where one more is drawn after the accepted ones (`Speculative`); nan without any."""
        return 1 + self.accepted / self.verifications if self.verifications else float("nan")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Tokens of a batch, as the generator's spec says, and what they took."""

    tokens: Tensor
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a callback sees after every step: for progress bars and previews."""

    step: Step
    decoding: Decoding


Callback = Callable[[Progress], None]


class Sampler(ABC):
    """Base of all samplers.

    Attributes:
        needs: names of the abilities (`Generator.offers`) without which it cannot run.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Weights that belong to it, such as a draft model's."""
        return ()

    @property
    def needs_codebook(self) -> bool:
        """Whether it compares codes; `use_codebook` then gives it the tokenizer's on composition."""
        return False

    def use_codebook(self, codebook: Tensor) -> None:
        """Take the tokenizer's code vectors as stored, `[K, C]` or `[D, K, C]`."""
        raise ValueError(f"{type(self).__name__} compares no codes and takes no codebook.")

    def check(self, generator: Generator) -> None:
        """Raise ValueError, with the reason and the way out, if this sampler does not fit the generator."""
        missing = sorted(self.needs - generator.offers)
        if missing:
            raise ValueError(f"{type(self).__name__} needs a generator that offers {', '.join(missing)}; "
                             f"{type(generator).__name__} does not, since {generator.lacks(missing[0])}. Choose a "
                             "sampler that needs nothing, such as Autoregressive.")

    @abstractmethod
    def sample(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None = None) -> Sampled:
        """Draw one batch. Prints nothing; `callback` is told of every step."""


def check_options(options: Mapping[str, Any], generator: Generator) -> None:
    """Raise ValueError unless every option, given once or per phase, is one that the generator's predictions take."""
    for phase, prediction in generator.predicts.items():
        for name in options_of_phase(options, phase, generator.predicts):
            if name not in prediction.options:
                raise ValueError(
                    f"draw option {name!r} does not fit: {type(generator).__name__} predicts {prediction.__name__} "
                    f"in phase {phase!r}, which takes {', '.join(sorted(prediction.options))}. Drop the option."
                )


GuidanceSetting = Schedule | Mapping[str, Schedule] | None
