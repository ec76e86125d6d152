"""What the zoo has, read from its configs: names, facts about each, and which of them a checkpoint belongs to.

Nothing here holds weights: networks are built on the meta device, files are read for their names and shapes.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from varzoo import costs
from varzoo.configs import KINDS, list_configs, text_of
from varzoo.core.checkpoint import atomic_path, read_config, read_weights, save_weights
from varzoo.core.errors import unknown
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Generator
from varzoo.hub import PUBLISHED, Published
from varzoo.loading import build, compose_config, load_weights, plain
from varzoo.samplers.base import Sampler
from varzoo.tokenizers.base import Tokenizer

GOLDENS_FOLDER = Path(__file__).parents[1] / "tests" / "goldens"  # in a checkout

NETWORKS = ("generator", "tokenizer")


def names(kind: str, pattern: str = "*") -> list[str]:
    """Names of one kind ("model", "tokenizer", "generator", "sampler", "experiment") that a shell pattern matches."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    return list_configs(kind, pattern)


def kind_of(name: str) -> str:
    """The kind of a name; a model goes before its generator, which may be called the same."""
    for kind in KINDS:
        if name in names(kind):
            return kind
    raise unknown("name", name, (entry for kind in KINDS for entry in names(kind)))


@lru_cache(maxsize=256)
def config_of(kind: str, name: str) -> DictConfig:
    """The composed config of a name: of the whole sampling (a model), of the whole training, or of one node."""
    if kind == "experiment":
        return compose_config("train", [f"experiment={name}"])
    whole = compose_config("sample", [f"{kind}={name}", "checkpoint=none"])
    return whole if kind == "model" else whole[kind]


def every(kind: str) -> DictConfig:
    """The composed configs of all tokenizers, generators or samplers by name, composed at once, which is faster."""
    return _together(kind, tuple(names(kind)))


@lru_cache(maxsize=16)
def _together(kind: str, members: tuple[str, ...]) -> DictConfig:
    asked = [f"+{kind}@every.{name}={name}" for name in members]
    return compose_config("sample", [*asked, "checkpoint=none"]).every


@overload
def on_meta(kind: Literal["generator"], name: str) -> Generator: ...
@overload
def on_meta(kind: str, name: str) -> Generator | Tokenizer: ...
def on_meta(kind: str, name: str) -> Generator | Tokenizer:
    """The network of a tokenizer's or generator's config, without memory for its weights."""
    return _on_meta(kind, name)


@lru_cache(maxsize=256)
def _on_meta(kind: str, name: str) -> Generator | Tokenizer:
    with torch.device("meta"):
        return build(every(kind)[name])


def parameters_of(kind: str, name: str) -> int:
    """How many numbers the weights of a tokenizer's or generator's config have."""
    return sum(parameter.numel() for parameter in on_meta(kind, name).parameters())


@lru_cache(maxsize=256)
def spec_of(kind: str, name: str) -> TokenSpec:
    """The tokens of a tokenizer's or generator's config; where the config states them, nothing is built."""
    node = every(kind)[name].get("spec")
    return on_meta(kind, name).spec if node is None else build(node)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Facts about a tokenizer or a generator.

    Attributes:
        name, kind: of its config.
        spec: its tokens.
        parameters: how many numbers its weights have.
        layouts: official layouts that it reads.
        about: the first words of its module.
        papers: arXiv ids that its module names, the first is its own.
        partners: configs of the other kind with the same tokens.
        samplers: sampler configs that fit a generator.
        drafting: those that fit once a draft model is given.
        published: official checkpoints of this config, by name.
        goldens: shell patterns of its class's golden cases.
    """

    name: str
    kind: str
    spec: TokenSpec
    parameters: int
    layouts: tuple[str, ...]
    about: str
    papers: tuple[str, ...]
    partners: tuple[str, ...]
    samplers: tuple[str, ...]
    drafting: tuple[str, ...]
    published: Mapping[str, Published]
    goldens: tuple[str, ...]


def describe(kind: str, name: str) -> Entry:
    """Facts about a tokenizer or a generator by its config, or about the generator of a model's, as it sets it up."""
    model = name if kind == "model" else None
    if model is not None:
        kind, name = "generator", generator_of(model) or model
        with torch.device("meta"):
            network = build(config_of("model", model).generator)
    else:
        network = on_meta(kind, name)
    documentation = inspect.getdoc(inspect.getmodule(type(network))) or ""
    other = NETWORKS[1 - NETWORKS.index(kind)]
    fitting, drafting = fitting_samplers(network) if isinstance(network, Generator) else ((), ())
    if model is not None or kind == "tokenizer":
        belongs = {model or name}
    else:
        belongs = {other for other in names("model") if generator_of(other) == name}
    return Entry(
        name=name, kind=kind, spec=network.spec,
        parameters=sum(parameter.numel() for parameter in network.parameters()), layouts=tuple(network.key_maps()),
        about=documentation.split("\n\n")[0].replace("\n", " "),
        papers=tuple(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", documentation))),
        partners=tuple(partner for partner in names(other) if spec_of(other, partner) == network.spec),
        samplers=fitting, drafting=drafting,
        published={key: published for key, published in PUBLISHED.items() if published.config in belongs},
        goldens=network.goldens)


def golden_cases(patterns: Iterable[str]) -> list[str]:
    """Names SYSTEM/CASE of the golden cases that shell patterns match, where tests lie beside the code."""
    return sorted({str(case.relative_to(GOLDENS_FOLDER)) for pattern in patterns
                   for case in GOLDENS_FOLDER.glob(pattern) if case.is_dir()})


def sampling_cost(model: str, progress: Callable[[Iterable], Iterable] = iter) -> costs.SamplingCost:
    """What one image's tokens cost, as a model's own sampler draws them; `progress` wraps the loop over its steps."""
    config = config_of("model", model)
    with torch.device("meta"):
        generator = build(config.generator)
        codebook = build(config.tokenizer).codebook() if generator.embeds_codebook else None
    return costs.of_sampling(generator, build(config.sampler), codebook, progress)


def tokenizer_cost(config: DictConfig, decode: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """FLOPs of encoding and of decoding one image by a tokenizer's config."""
    with torch.device("meta"):
        tokenizer = build(config)
    return costs.of_tokenizer(tokenizer, **(build(decode) if decode else {}))


def generator_of(model: str) -> str | None:
    """The name of the generator config that a model's config chooses, None if it spells its generator out."""
    text = text_of("model", model)
    found = re.search(r"override /generator: (\w+)", text)
    if found:
        return found[1]
    written = OmegaConf.create(text)
    bases = written.get("defaults", []) if isinstance(written, DictConfig) else []
    inherited = [base for base in bases if isinstance(base, str) and base in names("model")]
    return generator_of(inherited[0]) if inherited else None


@torch.no_grad()
def fitting_samplers(generator: Generator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the samplers that fit a generator, and of those that would with a draft model, which is not given."""
    fitting, drafting = [], []
    for name in names("sampler"):
        sampler = _sampler(name)
        if sampler is None:  # it drafts with a model
            kind: type[Sampler] = get_class(every("sampler")[name]["_target_"])
            if kind.needs <= generator.offers:
                drafting.append(name)
            continue
        with contextlib.suppress(ValueError):
            sampler.check(generator)
            fitting.append(name)
    return tuple(fitting), tuple(drafting)


def fitting(name: str) -> dict[str, tuple[str, ...]]:
    """Names by kind that fit a tokenizer, a generator, a model's generator, or a sampler."""
    kind = kind_of(name)
    if kind == "experiment":
        raise ValueError(f"{name} is an experiment, which has chosen already: name a tokenizer, generator or sampler.")
    if kind == "sampler":
        generators = tuple(generator for generator in names("generator")
                           if any(name in group for group in fitting_samplers(on_meta("generator", generator))))
        return {"generator": generators}
    entry = describe(kind, name)
    other = NETWORKS[1 - NETWORKS.index(entry.kind)]
    return {other: entry.partners, "sampler": (*entry.samplers, *entry.drafting)}


@lru_cache(maxsize=64)
def _sampler(name: str) -> Sampler | None:
    """A sampler's config built, None for one that drafts with a model."""
    try:
        return build(every("sampler")[name])
    except FileNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a file's names and shapes compare with a config's network.

    Attributes:
        kind, name: of the config.
        layout: the official layout that comes nearest, or "varzoo" for ours.
        missing, extra, reshaped: names that differ; all empty where the file fits.
    """

    kind: str
    name: str
    layout: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not (self.missing or self.extra or self.reshaped)

    @property
    def distance(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.reshaped)


def compare(state: Mapping[str, Tensor], kind: str, name: str) -> Match:
    """A state dict, of which only names and shapes count, beside the network of a config."""
    network = on_meta(kind, name)
    own = {key: tensor.shape for key, tensor in network.state_dict().items()}
    shapes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in state.items()}
    candidates = {"varzoo": shapes}
    for layout, key_map in network.key_maps().items():
        # names that the layout does not know, or tensors of a shape it cannot take apart, rule it out
        with contextlib.suppress(ValueError, RuntimeError):
            candidates[layout] = key_map.to_ours(shapes)
    matches = [Match(kind=kind, name=name, layout=layout,
                     missing=tuple(sorted(own.keys() - found.keys())), extra=tuple(sorted(found.keys() - own.keys())),
                     reshaped=tuple(sorted(key for key in own.keys() & found.keys() if own[key] != found[key].shape)))
               for layout, found in candidates.items()]
    return min(matches, key=lambda match: match.distance)


def identify(path: str | Path, progress: Callable[[list], Iterable] = iter) -> list[Match]:
    """Which configs a checkpoint belongs to: those that it fits, or else the three that come nearest.

    Args:
        path: a file of ours or of an official code.
        progress: wraps the loop over the configs, as `tqdm` does.
    """
    state = read_weights(path)
    every = [(kind, name) for kind in NETWORKS for name in names(kind)]
    matches = [compare(state, kind, name) for kind, name in progress(every)]
    fitting = [match for match in matches if match.fits]
    return fitting or sorted(matches, key=lambda match: match.distance)[:3]


def convert(source: str | Path, target: str | Path, *, name: str | None = None, layout: str | None = None) -> Path:
    """Official file -> ours with its config in the header; or back, where a layout is named.

    Args:
        source: the file.
        target: what to write: .safetensors, or .pt for the way back.
        name: the config (a tokenizer's or a model's name) of an official file.
        layout: the official layout to write, a name of the network's `key_maps()`.

    Raises:
        ValueError: the file does not fit, the name or layout is unknown, or both ways are asked for at once.
    """
    if name is not None and layout is None:
        return _to_ours(source, target, name)
    if layout is not None and name is None:
        return _to_official(source, target, layout)
    raise ValueError("give the name of an official file's config, or the layout to go back to, and not both.")


def _to_ours(source: str | Path, target: str | Path, name: str) -> Path:
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"our files are safetensors, got {target}: name it {Path(target).stem}.safetensors.")
    kind = kind_of(name)
    if kind not in ("model", "tokenizer"):
        raise ValueError(f"{name} names the {kind} of that name; a file is a tokenizer's or a model's: varzoo list.")
    config = config_of(kind, name)
    if kind == "tokenizer":
        node, header = config, {"tokenizer": plain(config)}
    else:
        whole = plain(config)
        node, header = config.generator, {key: whole[key] for key in ("generator", "sampler", "class_names")}
    save_weights(target, load_weights(build(node), source).state_dict(), header)
    return Path(target)


def _to_official(source: str | Path, target: str | Path, layout: str) -> Path:
    header = read_config(source) or {}
    kind = next((kind for kind in NETWORKS if kind in header), None)
    if kind is None:
        raise ValueError(f"{source} is no file of ours: no config of a generator or tokenizer stands in its header.")
    key_maps = build(header[kind]).key_maps()
    if layout not in key_maps:
        raise unknown(f"layout of {source}", layout, key_maps)
    state = key_maps[layout].to_official(read_weights(source))
    with atomic_path(target) as temporary:
        if Path(target).suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({"model": state}, temporary)
    return Path(target)
