"""option=value arguments of `python -m varzoo.eval`: which there are, for which of its jobs, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from varzoo.core.errors import unknown

JOBS = {
    "score": "samples=DIR|FILE.npz reference=... [protocol=adm | extractor=NAME]",
    "build": "reference=build data=NAME|DIR out=FILE.npz [protocol=adm | extractor=NAME]",
    "reconstruct": "reconstruct=TOKENIZER data=NAME|DIR out=DIR",
    "reproduce": "reproduce=NAME [tokenizer_]checkpoint=FILE reference=... out=DIR",
    "leaderboard": "leaderboard=DIR [results=FILE]",
}


@dataclass(frozen=True)
class Option:
    """One option: its default, the jobs it belongs to, what it means."""

    default: str | None
    jobs: str
    meaning: str


OPTIONS = {
    "samples": Option(None, "score", "a folder of images, or an .npz with arr_0 (images or clips)"),
    "reference": Option(None, "score build reproduce",
                        "digits[_train] | fashion_mnist[_train] | statistics.npz | images | build"),
    "reference_type": Option(None, "score build reproduce",
                             "train | validation | clips | images, where it does not say it"),
    "protocol": Option(None, "score build", "adm, torch_fidelity, pytorch_fid, tokenizer, "
                                            "fvd_{larp,styleganv,videogpt}"),
    "allow": Option("", "score reproduce", "fields of the protocol that may differ, as in count,labels"),
    "extractor": Option(None, "score build reproduce", "digits | fashion_mnist | mobilenet | dinov2 | inception"),
    "weights": Option(None, "score build reproduce", "file of the extractor's weights"),
    "download": Option("false", "score build reproduce", "true: fetch published weights that are nowhere"),
    "root": Option(None, "score build reproduce reconstruct", "where Fashion-MNIST lies"),
    "labels": Option(None, "score", "file with one class per line, of samples without"),
    "label_scheme": Option(None, "score", "how classes were chosen, of samples without a manifest"),
    "uint8_rule": Option(None, "score", "round | half_up | truncate | none, of samples without a manifest"),
    "also": Option("", "score", "more metrics: sfd, precision_recall, kid, pairs (PSNR, SSIM, LPIPS)"),
    "lpips": Option("alex", "score", "alex | vgg | none"),
    "splits": Option("10", "score", "splits of the inception score"),
    "kid_subsets": Option("100", "score", "KID's subsets"),
    "kid_size": Option("1000", "score", "samples of each"),
    "features": Option("false", "build", "true: keep all features, for precision, recall and KID"),
    "data": Option(None, "build reconstruct", "a data set by name (digits, digits_train, ...), or images"),
    "reconstruct": Option(None, "reconstruct", "a tokenizer's file or run"),
    "reproduce": Option(None, "reproduce", "a row of the leaderboard, such as mar_b"),
    "checkpoint": Option(None, "reproduce", "the generator's official file"),
    "tokenizer_checkpoint": Option(None, "reproduce", "the tokenizer's official file"),
    "override": Option("", "reproduce", "settings that differ from the row's, separated by spaces"),
    "count": Option(None, "reproduce", "number of samples, where not the protocol's"),
    "seed": Option("0", "reproduce", "seed of the samples"),
    "leaderboard": Option(None, "leaderboard", "folder for leaderboard.md and leaderboard.html"),
    "out": Option(None, "build reproduce reconstruct", "where to"),
    "state": Option(None, "score", "folder that lets a killed pass go on; emptied at the end"),
    "batch_size": Option("64", "score build reproduce reconstruct", "images per batch"),
    "device": Option("cpu", "score build reproduce reconstruct", "cpu | cuda"),
    "results": Option("results.jsonl", "score reproduce leaderboard", "file that rows are appended to"),
}
NEEDED = {"score": ("samples", "reference"), "build": ("data", "out"), "reconstruct": ("data", "out"),
          "reproduce": ("reference", "out"), "leaderboard": ()}


@dataclass(frozen=True)
class Options:
    """Parsed arguments of one job."""

    job: str
    values: Mapping[str, str | None]

    def __getitem__(self, name: str) -> str:
        """An option that the job needs, or that has a default."""
        value = self.values[name]
        assert value is not None, f"{name} may be left out: ask by get()"
        return value

    def get(self, name: str) -> str | None:
        """An option that may be left out."""
        return self.values[name]

    def of_job(self, job: str, **values: str) -> Options:
        """The options of another job, with these values; those that both jobs have are kept."""
        own = defaults(job)
        return Options(job, own | {name: value for name, value in self.values.items() if name in own} | values)

    def whole(self, name: str) -> int:
        """A positive whole number."""
        text = self[name]
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"{name} must be a positive whole number, got {text!r}.")
        return int(text)

    def flag(self, name: str) -> bool:
        if self[name] not in ("true", "false"):
            raise unknown(name, self[name], ("true", "false"))
        return self[name] == "true"

    def names(self, name: str) -> list[str]:
        """Names separated by commas."""
        return [part for part in self[name].split(",") if part]


def defaults(job: str) -> dict[str, str | None]:
    """All options of a job, as they are if they are not given."""
    return {name: option.default for name, option in OPTIONS.items() if job in option.jobs.split()}


def parse(arguments: list[str]) -> Options:
    """Options of a command line, with defaults. Raises ValueError for what is unknown, misplaced or missing."""
    given: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"expected option=value, got {argument!r}.")
        if name not in OPTIONS:
            raise unknown("option", name, OPTIONS)
        given[name] = value
    job = next((name for name in ("reproduce", "leaderboard", "reconstruct") if name in given), "score")
    job = "build" if given.get("reference") == "build" else job
    if not given:
        raise ValueError(f"what shall be done?\n{usage()}")
    misplaced = [name for name in given if job not in OPTIONS[name].jobs.split()]
    if misplaced:
        raise ValueError(f"{', '.join(misplaced)} has no meaning here: this is {JOBS[job]}")
    values = {**defaults(job), **given}
    missing = [name for name in NEEDED[job] if not values.get(name)]
    if job in ("score", "build") and not missing and not values["protocol"] and not values["extractor"]:
        raise ValueError("extractor must be given, or a protocol that knows its own: protocol=adm.")
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given.\n{usage()}")
    return Options(job, values)


def usage() -> str:
    """All jobs and options."""
    jobs = "\n".join(f"  python -m varzoo.eval {text}" for text in JOBS.values())
    lines = [f"  {name:20} {option.meaning}" + (f" ({option.default})" if option.default else "")
             for name, option in OPTIONS.items()]
    return f"{jobs}\nOptions:\n" + "\n".join(lines)
