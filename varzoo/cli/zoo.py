"""What the zoo has, and what a file is: `varzoo list | info | matrix | check | convert | recon`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from varzoo.configs import KINDS, list_configs
from varzoo.core.errors import unknown

RECON = {  # setting: its default, what it means
    "checkpoint": ("", "a tokenizer's file, or a run's folder"),
    "tokenizer": ("", "its config, of a file that carries none, such as vq16"),
    "out": ("recon.png", "where the picture goes (recon.png)"),
    "count": ("16", "how many images, the first ones (16)"),
    "lpips": ("alex", "alex, vgg or none (alex)"),
    "batch_size": ("8", "images at once (8)"),
    "root": ("", "where Fashion-MNIST lies"),
    "device": ("cpu", "cpu or cuda (cpu)")}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="varzoo", description="What the zoo has, and what a checkpoint is. Training, "
                                  "sampling and scoring are train.py, sample.py and python -m varzoo.eval.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="names: models, tokenizers, generators, samplers, experiments")
    listing.add_argument("pattern", nargs="?", default="*", help="as in a shell: 'mar*'")
    listing.add_argument("--kind", choices=KINDS, help="this kind only")
    listing.add_argument("--fits", metavar="NAME", help="tokenizers, generators and samplers that fit NAME")
    listing.add_argument("--tokens", metavar="WORDS", help="of such tokens: 'continuous grid', '16384 codes', ...")

    info = commands.add_parser("info", help="facts about a name: tokens, parameters, what fits, official files")
    info.add_argument("name")
    info.add_argument("--kind", choices=KINDS, help="where a name is of several kinds")

    matrix = commands.add_parser("matrix", help="which tokenizers, generators and samplers fit together")
    matrix.add_argument("--write", action="store_true", help="into docs/matrix.md and the README of a checkout")

    recon = commands.add_parser(
        "recon", help="originals beside a tokenizer's reconstructions, with PSNR, SSIM, LPIPS",
        description="Originals beside reconstructions as a PNG, with PSNR, SSIM and LPIPS.\nFor rFID over a whole data "
                    "set: python -m varzoo.eval reconstruct=TOKENIZER.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n" + "\n".join(f"  {name:12} {meaning}" for name, (_, meaning) in RECON.items()))
    recon.add_argument("images", help="a folder of images, or digits, digits_train, fashion_mnist")
    recon.add_argument("settings", nargs="+", metavar="name=value")

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
        print({"list": list_names, "info": info, "matrix": matrix, "recon": recon, "check": check,
               "convert": convert}[options.command](options))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # varzoo list | head
        sys.stderr.close()


def list_names(options: argparse.Namespace) -> str:
    found = {kind: list_configs(kind, options.pattern) for kind in KINDS if options.kind in (None, kind)}
    if options.fits or options.tokens:
        from varzoo import catalogue

        if options.fits:
            fitting = catalogue.fitting(options.fits)
            found = {kind: [name for name in entries if name in fitting.get(kind, ())]
                     for kind, entries in found.items()}
        if options.tokens:
            found = {kind: [name for name in entries if options.tokens in str(catalogue.spec_of(kind, name))]
                     for kind, entries in found.items() if kind in ("tokenizer", "generator")}
    if not any(found.values()):
        asked = " ".join([repr(options.pattern), *(f"--{name} {value!r}" for name in ("kind", "fits", "tokens")
                                                   if (value := getattr(options, name)))])
        raise ValueError(f"nothing is called {asked}; varzoo list names everything.")
    return "\n".join(wrapped(f"{kind}s", ", ".join(entries)) for kind, entries in found.items() if entries)


def matrix(options: argparse.Namespace) -> str:
    from varzoo import families

    if not options.write:
        return families.matrix_page().rstrip()
    return "\n".join(f"written: {path}" for path in families.write())


def recon(options: argparse.Namespace) -> str:
    from varzoo.cli.reconstruct import compare, images_of
    from varzoo.loading import compose_config, load_tokenizer

    settings = {name: default for name, (default, _) in RECON.items()}
    for setting in options.settings:
        name, _, value = setting.partition("=")
        if name not in RECON:
            raise unknown("setting", name, RECON)
        settings[name] = value
    if not settings["checkpoint"]:
        raise ValueError("give checkpoint=FILE, a tokenizer's file or a run's folder.")
    for name in ("count", "batch_size"):
        if not settings[name].isdigit() or int(settings[name]) < 1:
            raise ValueError(f"{name} must be a positive whole number, got {settings[name]!r}.")
    config = None
    if settings["tokenizer"]:
        config = compose_config("sample", [f"tokenizer={settings['tokenizer']}", "checkpoint=none"]).tokenizer
    tokenizer = load_tokenizer(settings["checkpoint"], config)
    scores = compare(tokenizer, images_of(options.images, settings["root"] or None, tokenizer.image_size),
                     Path(settings["out"]), count=int(settings["count"]), batch_size=int(settings["batch_size"]),
                     lpips=settings["lpips"], device=settings["device"])
    shown = "   ".join(f"{name.upper()} {value:.4f}" for name, value in scores.items())
    without = "" if "lpips" in scores else "   (without LPIPS, as asked)"
    return f"{settings['count']} images   {shown}{without}\nwritten: {settings['out']}"


def info(options: argparse.Namespace) -> str:
    from varzoo import catalogue

    kind = options.kind or catalogue.kind_of(options.name)
    if options.name not in catalogue.names(kind):
        raise unknown(kind, options.name, catalogue.names(kind))
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
    return "\n".join([*lines, wrapped("verified", verified(entry.goldens))])


def costs(kind: str, name: str) -> list[str]:
    """What an image costs: of a model by its own sampler, of a tokenizer both ways."""
    from tqdm import tqdm

    from varzoo import catalogue

    config = catalogue.config_of(kind, name)
    if kind == "generator":
        return [wrapped("cost", "depends on the sampler: ask for a model, or see varzoo info MODEL")]
    if kind == "tokenizer":
        encoding, decoding = catalogue.tokenizer_cost(config)
        return [wrapped("cost", f"{flops(encoding)} to encode an image, {flops(decoding)} to decode it; a multiply-add "
                                "is 2 FLOPs")]
    cost = catalogue.sampling_cost(name, lambda steps: tqdm(steps, desc="counting", unit="step", leave=False))
    _, decoding = catalogue.tokenizer_cost(config.tokenizer, config.decode)
    return [
        wrapped("evaluations", f"{cost.steps} AR steps: {cost.backbone} of the backbone, {cost.head} of the head per "
                f"image; with each branch of guidance counted {cost.backbone_passes} and {cost.head_passes}"),
        wrapped("cost", f"{flops(cost.flops)} per image for its tokens, guidance included ({flops(cost.unguided_flops)}"
                f" without), and {flops(decoding)} to decode them; a multiply-add is 2 FLOPs")]


def flops(count: int) -> str:
    return f"{count / 1e12:.2f} TFLOPs" if count >= 1e12 else f"{count / 1e9:.2f} GFLOPs"


def verified(patterns: Sequence[str]) -> str:
    """How a network was compared with the official code, given the patterns of its golden cases."""
    from varzoo import catalogue

    if not patterns:
        return "no golden cases: there is nothing official to compare with, or none was recorded; see its page"
    cases = len(catalogue.golden_cases(patterns))
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
