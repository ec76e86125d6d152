"""What the zoo has, and what a file is: `varzoo list`, `varzoo info NAME`, `varzoo check FILE`, `varzoo convert`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

KINDS = ("model", "tokenizer", "generator", "sampler", "experiment")  # catalogue.KINDS; help must not import torch


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="varzoo", description="What the zoo has, and what a checkpoint is. Training, "
                                  "sampling and scoring are train.py, sample.py and python -m varzoo.eval.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="names: models, tokenizers, generators, samplers, experiments")
    listing.add_argument("pattern", nargs="?", default="*", help="as in a shell: 'mar*'")
    listing.add_argument("--kind", choices=KINDS, help="this kind only")

    info = commands.add_parser("info", help="facts about a name: tokens, parameters, what fits, official files")
    info.add_argument("name")
    info.add_argument("--kind", choices=KINDS, help="where a name is of several kinds")

    check = commands.add_parser("check", help="which configs a checkpoint belongs to, and what is missing or extra")
    check.add_argument("file", type=Path)

    convert = commands.add_parser("convert", help="an official file to ours, with its config inside, or back")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument("--name", help="the model or tokenizer that the official file is of")
    way.add_argument("--layout", help="the official layout to go back to, as varzoo info names it")
    return top


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        print({"list": list_names, "info": info, "check": check, "convert": convert}[options.command](options))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # varzoo list | head
        sys.stderr.close()


def list_names(options: argparse.Namespace) -> str:
    from varzoo import catalogue

    found = {kind: catalogue.names(kind, options.pattern) for kind in KINDS if options.kind in (None, kind)}
    if not any(found.values()):
        raise ValueError(f"nothing is called {options.pattern!r}; varzoo list names everything.")
    return "\n".join(wrapped(f"{kind}s", ", ".join(entries)) for kind, entries in found.items() if entries)


def info(options: argparse.Namespace) -> str:
    from varzoo import catalogue

    kind = options.kind or catalogue.kind_of(options.name)
    if options.name not in catalogue.names(kind):
        raise catalogue.unknown(kind, options.name, catalogue.names(kind))
    if kind in ("sampler", "experiment"):
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(catalogue.config_of(kind, options.name)).rstrip()
    lines, entry = [], catalogue.describe(kind, options.name)
    if kind == "model":
        config = catalogue.config_of(kind, options.name)
        lines.append(wrapped("model", f"{options.name}; sampler "
                             f"{config.sampler._target_.rpartition('.')[2]}, guidance {config.sampler.guidance}, plan "
                             f"{config.sampler.get('plan')}, draw {config.sampler.get('draw')}"))
    other = "tokenizers" if entry.kind == "generator" else "generators"
    lines += [wrapped(entry.kind, f"{entry.name}: {entry.about}"), wrapped("tokens", str(entry.spec)),
              wrapped("parameters", f"{entry.parameters / 1e6:.1f}M"), *costs(kind, options.name),
              wrapped("papers", ", ".join(f"arXiv {paper}" for paper in entry.papers) or "none named"),
              wrapped("layouts", ", ".join(entry.layouts) or "none"),
              wrapped(other, ", ".join(entry.partners) or "none of this spec")]
    if entry.kind == "generator":
        lines.append(wrapped("samplers", ", ".join(entry.samplers) or "none"))
        if entry.drafting:
            lines.append(wrapped("", f"with a draft model: {', '.join(entry.drafting)}"))
    for key, published in entry.published.items():
        lines.append(wrapped("official file", f"{key}: {published.where}; layout {published.layout}; licence: "
                             f"{published.licence}"))
    if not entry.published:
        lines.append(wrapped("official file", "none is published"))
    return "\n".join([*lines, wrapped("verified", verified(entry.system))])


def costs(kind: str, name: str) -> list[str]:
    """What an image costs: of a model by its own sampler, of a tokenizer both ways."""
    from varzoo import catalogue

    config = catalogue.config_of(kind, name)
    if kind == "generator":
        return [wrapped("cost", "depends on the sampler: ask for a model, or see varzoo info MODEL")]
    if kind == "tokenizer":
        encoding, decoding = catalogue.tokenizer_cost(config)
        return [wrapped("cost", f"{flops(encoding)} to encode an image, {flops(decoding)} to decode it; a multiply-add "
                                "is 2 FLOPs")]
    cost, (_, decoding) = catalogue.sampling_cost(name), catalogue.tokenizer_cost(config.tokenizer, config.decode)
    return [
        wrapped("evaluations", f"{cost.steps} AR steps: {cost.backbone} of the backbone, {cost.head} of the head per "
                f"image; with each branch of guidance counted {cost.backbone_passes} and {cost.head_passes}"),
        wrapped("cost", f"{flops(cost.flops)} per image for its tokens, guidance included ({flops(cost.unguided_flops)}"
                f" without), and {flops(decoding)} to decode them; a multiply-add is 2 FLOPs")]


def flops(count: int) -> str:
    return f"{count / 1e12:.2f} TFLOPs" if count >= 1e12 else f"{count / 1e9:.2f} GFLOPs"


def verified(system: str) -> str:
    """How a class of networks was compared with the official code."""
    from varzoo import catalogue

    patterns = catalogue.GOLDENS[system]
    if not patterns:
        return "no golden cases: there is nothing official to compare with, or none was recorded; see its page"
    cases = len(catalogue.golden_cases(system))
    number = f"{cases} golden cases" if cases else "golden cases of the repository"
    return (f"{number} of the official code on tiny models ({', '.join(patterns)} in tests/goldens); not run on real "
            "weights")


def check(options: argparse.Namespace) -> str:
    from tqdm import tqdm

    from varzoo import catalogue

    matches = catalogue.identify(options.file, lambda every: tqdm(every, desc="comparing", unit="config", leave=False))
    if matches[0].fits:
        return "\n".join(f"{options.file} fits {match.kind}={match.name} (layout {match.layout})" for match in matches)
    lines = [f"{options.file} fits nothing in the zoo. Nearest:"]
    for match in matches:
        lines.append(f"  {match.kind}={match.name} (layout {match.layout}):")
        for what, keys in (("missing", match.missing), ("extra", match.extra), ("of another shape", match.reshaped)):
            if keys:
                lines.append(f"    {len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    sys.exit("\n".join(lines))


def convert(options: argparse.Namespace) -> str:
    from varzoo import catalogue

    return f"written: {catalogue.convert(options.source, options.target, name=options.name, layout=options.layout)}"


def wrapped(title: str, text: str) -> str:
    """A title and its text in columns that fit a screen."""
    return textwrap.fill(text, width=100, initial_indent=f"{title:<14}", subsequent_indent=" " * 14)


if __name__ == "__main__":
    main()
