"""What fits what, by system rather than by size, read from the configs and rendered as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from varzoo import catalogue
from varzoo.configs import text_of
from varzoo.core.checkpoint import atomic_path
from varzoo.core.spec import TokenSpec
from varzoo.generators.base import Generator
from varzoo.loading import build, fit_together, plain
from varzoo.tokenizers.base import Tokenizer

ROOT = Path(__file__).parents[1]  # of a checkout
RENEW = "varzoo matrix --write"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The configs of one class of tokenizers or generators.

    Attributes:
        kind: "tokenizer" or "generator".
        system: the class.
        members: names of its configs.
    """

    kind: str
    system: type[Generator | Tokenizer]
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.system.__name__

    @property
    def about(self) -> str:
        """The first words of its module."""
        return first_line(inspect.getdoc(inspect.getmodule(self.system)) or "")

    @property
    def page(self) -> str | None:
        """The page of docs that is about its module, where docs lie beside the code."""
        module = self.system.__module__.replace(".", "/")
        pages = sorted((ROOT / "docs").glob("*.md"))
        own = [page for page in pages if f"{page.stem}" in module.rpartition("varzoo/")[2].split("/")]
        naming = [page for page in pages if f"{module}.py" in page.read_text()]
        found = [*own, *naming]
        return f"docs/{found[0].name}" if found else None


def first_line(documentation: str) -> str:
    """The first line of a module's documentation, without full stop."""
    return documentation.partition("\n")[0].rstrip(".").replace("|", "\\|")


@cache
def families(kind: str) -> tuple[Family, ...]:
    """The families of a kind, by name."""
    members: dict[type[Generator | Tokenizer], list[str]] = {}
    for name in catalogue.names(kind):
        members.setdefault(type(catalogue.on_meta(kind, name)), []).append(name)
    found = (Family(kind=kind, system=system, members=tuple(names)) for system, names in members.items())
    return tuple(sorted(found, key=lambda family: family.name.lower()))


@cache
def variants(family: Family) -> dict[TokenSpec, Generator | Tokenizer]:
    """A family's networks on the meta device by their tokens: one of each, of its configs and of models' own settings.
    """
    found = {catalogue.spec_of(family.kind, name): catalogue.on_meta(family.kind, name) for name in family.members}
    for model in catalogue.names("model"):
        if not re.search(rf"^{family.kind}:", text_of("model", model), re.MULTILINE):
            continue
        node = catalogue.config_of("model", model)[family.kind]
        if node is not None and node["_target_"].endswith(f".{family.name}"):
            with torch.device("meta"):
                network = build(node)
            found.setdefault(network.spec, network)
    return found


def drawing() -> tuple[Family, ...]:
    """The families of generators that draw by themselves: all but drafters."""
    return tuple(family for family in families("generator")
                 if issubclass(family.system, Generator) and not family.system.needs_target)


def takes(generator: Family, tokenizer: Tokenizer) -> bool:
    """Whether a family of generators, in the smallest of its configs, can be built for a tokenizer's tokens."""
    try:
        with torch.device("meta"):
            fit_together(tokenizer, build(with_spec(catalogue.every("generator")[smallest(generator)], tokenizer.spec)))
    except ValueError:
        return False
    return True


def with_spec(generator: Mapping[str, Any] | DictConfig, spec: TokenSpec) -> dict[str, Any]:
    """A generator's config, set up for other tokens."""
    return plain(generator) | {"spec": {"_target_": "varzoo.core.spec.TokenSpec", **asdict(spec)}}


def fit(tokenizer: Family, generator: Family) -> str:
    """"fits" where configs of the two fit as they are, "takes" where the generator's `spec` must be set, or ""."""
    if variants(tokenizer).keys() & variants(generator).keys():
        return "fits"
    networks = (network for network in variants(tokenizer).values() if isinstance(network, Tokenizer))
    return "takes" if any(takes(generator, network) for network in networks) else ""


def smallest(family: Family) -> str:
    """The config of a family with the fewest parameters."""
    return min(family.members, key=lambda name: catalogue.parameters_of(family.kind, name))


@cache
def samplers(family: Family) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Samplers that fit a family of generators, in its smallest config, and those that do with a draft model."""
    return catalogue.fitting_samplers(catalogue.on_meta("generator", smallest(family)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def matrix_page() -> str:
    """The page docs/matrix.md."""
    tokenizers, mark = families("tokenizer"), {"fits": "●", "takes": "○", "": ""}
    pairs = table(["", *(family.name for family in tokenizers)],
                  ([generator.name, *(mark[fit(tokenizer, generator)] for tokenizer in tokenizers)]
                   for generator in drawing()))
    sampling = table(["generator", "samplers", "with a draft model"],
                     ([family.name, *map(code, samplers(family))] for family in drawing()))
    members = table(["family", "configs"], ([family.name, code(family.members)]
                                            for family in (*tokenizers, *families("generator"))))
    return f"""# What fits what

Rendered from the configs by `{RENEW}`; `varzoo matrix` prints it, `varzoo info NAME` says it of a single config.

## Tokenizers and generators

A pair fits if both speak of the same tokens. ●: some configs of the two fit as they are. ○: the generator can be built
for such tokens, once its `generator.spec` is set to theirs and it is trained anew. Empty: that alone is not enough, and
what is tried says why.

{pairs}

## Generators and samplers

Samplers are the names of their configs, as in `sampler=diffusion`. Whether a sampler that compares codes or drafts with
a model fits a run depends on the tokenizer and the draft model too; what does not fit is refused with the reason.

{sampling}

## Families

{members}
"""


def systems_table() -> str:
    """The README's table of tokenizers and generators."""
    rows = []
    for family in (*families("tokenizer"), *families("generator")):
        page = family.page
        link = "" if page is None else f"[{Path(page).stem}]({page})"
        rows.append([family.name, family.kind, family.about, code(family.members), link])
    return table(["system", "kind", "what", "configs", "page"], rows)


def samplers_table() -> str:
    """The README's table of samplers, each with the first line of its config."""
    fitting = {family.name: samplers(family) for family in drawing()}
    rows = []
    for name in catalogue.names("sampler"):
        about = first_line(text_of("sampler", name).lstrip("# "))
        alone, drafting = ([family for family, found in fitting.items() if name in found[place]] for place in (0, 1))
        rows.append([f"`{name}`", about, ", ".join(alone or drafting)])
    return table(["sampler", "what", "draws from"], rows)


def with_tables(readme: str) -> str:
    """The README with its tables renewed. Raises ValueError if it has no place for one."""
    for name, rendered in (("systems", systems_table()), ("samplers", samplers_table())):
        begin, end = f"<!-- {name}: rendered by `{RENEW}` -->", f"<!-- {name} end -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md has no lines {begin} and {end}, between which the table of {name} goes.")
        readme = f"{before}{begin}\n\n{rendered}\n\n{end}{after}"
    return readme


def write() -> list[Path]:
    """Renew docs/matrix.md and the README's tables, in a checkout; returns the two files."""
    readme, page = ROOT / "README.md", ROOT / "docs" / "matrix.md"
    if not readme.is_file():
        raise FileNotFoundError(f"there is no {readme}: --write is for a checkout of the repository.")
    for path, text in ((readme, with_tables(readme.read_text())), (page, matrix_page())):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    return [readme, page]
