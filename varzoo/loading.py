"""From configs and checkpoints to models that fit together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from varzoo.configs import list_models
from varzoo.core.checkpoint import existing, load_strictly, read_config, read_weights
from varzoo.core.draws import Draws
from varzoo.core.errors import unknown
from varzoo.core.spec import require_same_tokens
from varzoo.generators.base import Condition, Generator
from varzoo.hub import PUBLISHED, fetch
from varzoo.samplers.base import Callback, Counts, Progress, Sampler
from varzoo.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER_FILE, GENERATOR_FILE = "tokenizer.safetensors", "generator.safetensors"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A tokenizer, a generator and a sampler that fit together.

    Raises:
        ValueError: they do not, with the reason.
    """

    tokenizer: Tokenizer
    generator: Generator
    sampler: Sampler
    class_names: tuple[str, ...] = ()
    output_size: int | None = None  # side to which decoded images are resized before they become uint8
    decode: Mapping[str, Any] = field(default_factory=dict)  # options of the tokenizer's `decode`

    def __post_init__(self) -> None:
        fit_together(self.tokenizer, self.generator)
        equip(self.sampler, self.generator, self.tokenizer)
        for name in self.decode:
            if name not in self.tokenizer.options:
                raise unknown(f"decode option of {type(self.tokenizer).__name__}", name, self.tokenizer.options)

    @torch.no_grad()
    def sample(self, condition: Condition | list[int], *, seed: int = 0, samples: range | None = None,
               callback: Callback | None = None, preview: Callable[[Tensor], None] | None = None,
               ) -> tuple[Tensor, Counts]:
        """Draw images.

        Args:
            condition: what to draw; a list of class ids for short.
            seed: the run's seed; together with the sample index it determines an image.
            samples: index of every image, from 0 on by default.
            callback: is told of every step of the sampler.
            preview: is shown uint8 `[B, 3, H, W]` whenever the tokens drawn so far give a better image; the last is the
                result, which is the same without previews. For tokenizers that stream.

        Returns:
            uint8 `[B, 3, H, W]` and what they took.
        """
        if not isinstance(condition, Condition):
            condition = Condition.classes(torch.tensor(condition))
        device = next(self.generator.parameters()).device
        draws = Draws(seed, tuple(samples if samples is not None else range(condition.size)), device)
        condition = condition.to(device)
        if preview is None:
            sampled = self.sampler.sample(self.generator, condition, draws, callback)
            images = self.tokenizer.decode(sampled.tokens, draws, **self.decode)
            return self._finished(images), sampled.counts
        stream, pushed = self.tokenizer.stream(draws, **self.decode), 0

        def follow(progress: Progress) -> None:
            nonlocal pushed
            drawn = progress.step.drawn + progress.step.positions.shape[1]
            if stream.push(progress.decoding.tokens[:, pushed:drawn]):
                preview(self._finished(stream.preview()))
            pushed = drawn
            if callback is not None:
                callback(progress)

        counts = self.sampler.sample(self.generator, condition, draws, follow).counts
        return self._finished(stream.preview()), counts

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.tokenizer.image_size if self.output_size is None else (self.output_size, self.output_size)

    @property
    def resize(self) -> str:
        """What is done to decoded images, in a protocol's words."""
        return "none" if self.output_size is None else f"bicubic from {self.tokenizer.image_size[0]}"

    def _finished(self, images: Tensor) -> Tensor:
        """Decoded images as uint8. LlamaGen draws at 384 and scores at 256, bicubic without antialiasing."""
        if self.output_size is not None:
            images = F.interpolate(images.float(), size=self.image_size, mode="bicubic")
        return self.tokenizer.to_uint8(images)


def fit_together(tokenizer: Tokenizer, generator: Generator) -> None:
    """Compose the two: their tokens must be the same, and a generator that embeds with the codebook gets it."""
    require_same_tokens(tokenizer.spec, generator.spec)
    if generator.embeds_codebook:
        generator.use_codebook(tokenizer.codebook())


def equip(sampler: Sampler, generator: Generator, tokenizer: Tokenizer) -> None:
    """Check that a sampler fits, and give it the tokenizer's codes where it compares them."""
    sampler.check(generator)
    if sampler.needs_codebook:
        try:
            codebook = tokenizer.stored_codebook()
        except ValueError:
            raise ValueError(f"this sampler compares codes, and {type(tokenizer).__name__} has no codebook. Choose one "
                             "that does not, such as sampler=sjd or sampler=categorical.") from None
        sampler.use_codebook(codebook.detach())


def build(config: Mapping[str, Any] | DictConfig) -> Any:
    """Instantiate a config node. Raises ValueError with the cause, not Hydra's trace of it."""
    if isinstance(config, DictConfig):  # resolved here, where the whole config is still around the node
        config = OmegaConf.to_container(config, resolve=True)
    try:
        return instantiate(config, _convert_="all")
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | FileNotFoundError | ImportError):
            raise cause from None
        raise


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint of ours or of the official code into a model, strictly, and put it into eval mode."""
    path = existing(path)
    state = read_weights(path)
    own, layouts = set(model.state_dict()), model.key_maps()
    if layouts and set(state) != own:
        problems = []
        for layout, key_map in layouts.items():
            try:
                translated = key_map.to_ours(state)
            except ValueError as error:
                problems.append(f"{layout}: {error}")
                continue
            # An official file may leave out statistics that only training needs; ours are then kept.
            load_strictly(model, translated, f"{path} (official layout {layout!r})")
            return model.eval()
        raise ValueError(f"{path} fits no layout of {type(model).__name__}. {' '.join(problems)}")
    load_strictly(model, state, str(path))
    return model.eval()


def load_tokenizer(checkpoint: str | Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A tokenizer from a file, or from a run's folder; its config stands in the file, or is given; see `node_of`."""
    path = Path(checkpoint) / TOKENIZER_FILE if Path(checkpoint).is_dir() else Path(checkpoint)
    return load_weights(build(node_of(path, config)), path)


def load_generator(checkpoint: str | Path | None, name: str | None = None) -> Generator:
    """A generator from a run's folder or a file: what a sampler drafts with, or a drafter learns from.

    Args:
        checkpoint: the folder or file.
        name: its config (a name of the generator group), for a file that carries none.
    """
    if checkpoint is None:
        raise FileNotFoundError("this sampler drafts with a model: give drafter=RUN or drafter=FILE, of a drafter or a "
                                "smaller generator. A missing checkpoint is never replaced by random weights.")
    path = Path(checkpoint) / GENERATOR_FILE if Path(checkpoint).is_dir() else Path(checkpoint)
    header = read_config(path)
    if header is None and name is None:
        raise ValueError(f"{path} carries no config; name it, as in drafter_config=drafter_llamagen_xl.")
    node = (compose_config("sample", [f"generator={name}", "checkpoint=none"]).generator if header is None
            else header["generator"])
    return load_weights(build(node), path)


def node_of(path: Path, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a tokenizer's file: the file's own; or what is given, where the file carries none.

    Where a tokenizer over a VAE is given and the file is another tokenizer's, that is the VAE, its measured scale
    included: a tokenizer that learns nothing of its own is complete with it.
    """
    header = read_config(path)
    if header is None and config is None:
        raise ValueError(f"{path} carries no config; name it, as in `tokenizer=vq16 tokenizer_checkpoint={path}`.")
    if header is None:
        return corrected(config, path)
    if config is not None and "vae" in config and "vae" not in header["tokenizer"]:
        node = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
        return node | {"vae": header["tokenizer"]}
    return header["tokenizer"]


def corrected(config: Mapping[str, Any] | DictConfig, path: Path) -> dict[str, Any]:
    """A tokenizer's config with what an official file says of itself; every difference is reported as a warning."""
    node = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    said, remarks = get_class(node["_target_"]).settings_of(existing(path))
    ours, theirs = flattened(node), flattened(said)
    remarks += [f"{name} is {value}, where the config assumes {ours.get(name)}" for name, value in theirs.items()
                if ours.get(name) != value]
    for remark in remarks:
        log.warning("%s: %s", path, remark)
    return OmegaConf.to_container(OmegaConf.merge(node, said))


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level, with names such as "decoder.depth"."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def compose_config(name: str, overrides: list[str]) -> DictConfig:
    """Compose one of the package's configs outside of a Hydra application."""
    if GlobalHydra.instance().is_initialized():
        return compose(name, overrides)
    with initialize_config_module("varzoo.configs", version_base="1.3"):
        return compose(name, overrides)


def load(name_or_path: str | Path, *, checkpoint: str | Path | None = None,
         tokenizer_checkpoint: str | Path | None = None, overrides: list[str] | None = None) -> Model:
    """Load a model by name (`list_models`) with its official files, or from a run's folder or generator file.

    Args:
        name_or_path: "llamagen_b", or "runs/digits_llamagen".
        checkpoint: the generator's file, for a model by name.
        tokenizer_checkpoint: the tokenizer's file, for a model by name.
        overrides: Hydra overrides, such as "sampler.guidance.scale=3", or "download=true" to fetch published files.

    Raises:
        FileNotFoundError: a checkpoint is missing; it is never replaced by random weights.
        ValueError: a file does not fit, or the name is unknown.
    """
    overrides, path = list(overrides or []), Path(name_or_path)
    if path.exists():
        checkpoint, tokenizer_checkpoint = register_run(path, own_sampler=not chooses_sampler(overrides))
        name_or_path = "run"
    elif str(name_or_path) not in list_models():
        raise unknown("model or run", name_or_path, list_models())
    config = compose_config("sample", [f"model={name_or_path}", *overrides])
    return from_config(config, checkpoint, tokenizer_checkpoint)


def chooses_sampler(overrides: Sequence[str]) -> bool:
    """Whether overrides name a sampler's config, as in sampler=lantern."""
    return any(override.startswith("sampler=") for override in overrides)


def register_run(path: Path, own_sampler: bool = True) -> tuple[Path, Path]:
    """Make what `train.py` left in a folder (or its generator file) the config `model=run`; return its two files.

    Its sampler is that of the run, unless another one is chosen (`own_sampler` False).
    """
    path = existing(path / GENERATOR_FILE if path.is_dir() else path)
    header = read_config(path)
    if header is None or "generator" not in header:
        raise ValueError(f"{path} is no generator of our own; name its model, as in `model=mar_b checkpoint={path}`.")
    tokenizer_path = existing(path.parent / TOKENIZER_FILE)
    names = ("generator", "sampler", "class_names") if own_sampler else ("generator", "class_names")
    node = {name: header[name] for name in names}
    node["tokenizer"] = read_config(tokenizer_path)["tokenizer"]
    ConfigStore.instance().store(name="run", group="model", node=node, package="_global_")
    return path, tokenizer_path


def from_config(config: DictConfig, checkpoint: str | Path | None, tokenizer_checkpoint: str | Path | None) -> Model:
    """Build the tokenizer, generator and sampler of a composed config and load the two files.

    Files that are not given are fetched if the config says `download` and they are published.
    """
    published = PUBLISHED.get(config.published)
    checkpoint = checkpoint or find_published("checkpoint", config.published, config.download)
    tokenizer_checkpoint = tokenizer_checkpoint or find_published(
        "tokenizer_checkpoint", published and published.tokenizer, config.download)
    return Model(tokenizer=load_tokenizer(tokenizer_checkpoint, config.tokenizer),
                 generator=load_weights(build(config.generator), checkpoint), sampler=build(config.sampler),
                 class_names=tuple(config.class_names), output_size=config.output_size,
                 decode=build(config.decode) if config.decode else {})


def find_published(setting: str, name: str | None, download: bool) -> Path:
    """The published file that stands in for a setting. Raises FileNotFoundError saying where it is to be had."""
    if name is not None and download:
        return fetch(name)
    where = f" ({PUBLISHED[name].where}; download=true fetches it)" if name in PUBLISHED else ""
    raise FileNotFoundError(f"give {setting}=FILE{where}. A missing checkpoint is never replaced by random weights.")
