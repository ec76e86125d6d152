"""Every compatible (tokenizer, generator, sampler) triple that the configs allow, at a debug size, end to end.

The triples are read from the configs: a new smoke experiment or sampler is in the matrix by being there.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from varzoo import catalogue
from varzoo.core.spec import require_same_tokens
from varzoo.eval.features import ClassifierFeatures
from varzoo.eval.score import Samples, dataset_samples, reference_statistics, score
from varzoo.families import with_spec
from varzoo.loading import build, compose_config, equip, fit_together, flattened, load, register_run
from varzoo.samplers.base import Sampler
from varzoo.training.run import train

TRAINED = [name for name in catalogue.names("experiment", "smoke_*")
           if (node := catalogue.config_of("experiment", name).generator) is not None
           and not get_class(node["_target_"]).needs_target]  # a drafter draws nothing by itself
DEBUG_TOKENIZERS = [name for name in catalogue.names("tokenizer") if re.search(r"_(tiny|f\d)$", name)]
DEBUG_GENERATORS = catalogue.names("generator", "*_tiny*")
LABELS = [3, 7, 3, 7, 0]


def small(sampler: str | None, run: Path) -> list[str]:
    """Overrides that make a sampler, or the run's own, quick; one that drafts with a smaller generator gets the run."""
    overrides = [] if sampler is None else [f"sampler={sampler}"]
    config = compose_config("sample", [*overrides, "model=run", "checkpoint=none"])
    settings = {section: flattened(config.sampler.get(section) or {}) for section in ("plan", "draw")}
    overrides += [f"sampler.{section}.{name}=2" for section, flat in settings.items() for name in flat
                  if name.rpartition(".")[2] == "steps"]  # of all phases
    return overrides + ([f"drafter={run}"] if "drafter" in config else [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie, so that a tokenizer is trained once."""
    return tmp_path_factory.mktemp("matrix")


def trained(experiment: str, *overrides: str) -> Path:
    """The folder of a run of two steps."""
    return train(compose_config("train", [f"experiment={experiment}", "steps=2", "samples_every=0",
                                          "validate_every=999", "checkpoint_every=2", "batch_size=8",
                                          "learning_rate=constant", *overrides]))


@pytest.mark.parametrize("experiment", TRAINED)
def test_triples(experiment: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of training, its checkpoint read again, guided samples by every sampler that fits, decoded, scored."""
    monkeypatch.chdir(folder)
    run = trained(experiment)
    register_run(run)
    own = load(run, overrides=small(None, run))
    register_run(run, own_sampler=False)
    fits, images = ["its own"], [own.sample(LABELS)[0]]
    fitting, drafting = catalogue.fitting_samplers(own.generator)
    for name in catalogue.names("sampler"):
        if name in (*fitting, *drafting):
            try:
                drawn, counts = load(run, overrides=small(name, run)).sample(LABELS, seed=1)
            except ValueError as error:
                assert name not in fitting, f"{name} is said to fit {experiment}, but is refused: {error}"
                reason = str(error)
            else:
                assert drawn.dtype == torch.uint8 and drawn.shape == images[0].shape and counts.steps > 0, name
                images.append(drawn)
                fits.append(name)
                continue
        else:
            try:
                sampler = build(catalogue.every("sampler")[name])
            except FileNotFoundError:  # it drafts with a model, and so needs what the generator does not offer
                continue
            with pytest.raises(ValueError) as refused:
                equip(sampler, own.generator, own.tokenizer)
            reason = str(refused.value)
        ways_out = ("hoose", "use ", "rop the option", "ive ", "raft one", "raft with", "takes no plan")
        assert any(way in reason for way in ways_out), f"{name}: {reason}"

    extractor = ClassifierFeatures(dataset="digits")
    train_set = build(catalogue.config_of("experiment", experiment).data.train)
    reference = reference_statistics(dataset_samples(train_set), extractor=extractor)
    labels = torch.tensor(LABELS * len(images))
    scores = score([Samples(torch.cat(images), labels, torch.arange(len(labels)))], count=len(labels),
                   reference=reference, extractor=extractor)
    assert scores.fd > 0
    print(f"{experiment}: {', '.join(fits)}")


def test_triples_with_a_drafter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers whose draft is an EAGLE drafter's, which learns from its target: both are trained, and draw."""
    monkeypatch.chdir(folder)
    target = trained("smoke_llamagen", "run_dir=runs/target")
    drafter = trained("smoke_drafter", "target_experiment=null", f"target_checkpoint={target}")
    names = [name for name in catalogue.fitting_samplers(load(target).generator)[1]
             if "eagle" in str(catalogue.every("sampler")[name]).lower()]
    assert {"eagle", "eagle2", "lantern", "lantern_pp"} <= set(names)
    for name in names:
        overrides = [f"sampler={name}", f"drafter={drafter}"]
        if "k" in catalogue.every("sampler")[name].policy:
            overrides.append("sampler.policy.k=8")  # of 128 codes
        images, counts = load(target, overrides=overrides).sample(LABELS, seed=1)
        assert images.dtype == torch.uint8 and counts.draft_evaluations > 0, name
    print(f"with a drafter: {', '.join(names)}")


ALONE = [name for name in catalogue.names("experiment", "smoke_*")
         if catalogue.config_of("experiment", name).generator is None]  # what trains a tokenizer
ONE_EACH = {catalogue.config_of("experiment", name).generator["_target_"]: name for name in reversed(TRAINED)}.values()
OTHERS = [*([f"experiment={name}"] for name in ALONE),
          ["experiment=smoke_kl", "tokenizer=tokenbridge_f2"],  # a tokenizer over the VAE of another, without training
          ["experiment=smoke_bae", "tokenizer.bits=8", "tokenizer.groups=1"]]  # one id per position


@pytest.mark.parametrize("experiment", ONE_EACH)
def test_a_generator_set_up_for_other_tokens_learns_and_draws_them(
        experiment: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the matrix says is possible with another `generator.spec` is done: trained, read again, drawn from."""
    monkeypatch.chdir(folder)
    generator, own = catalogue.config_of("experiment", experiment).generator, source_of(experiment).tokenizer
    for source, *settings in OTHERS:
        config = compose_config("train", [source, *settings])
        with torch.device("meta"):
            tokenizer = build(config.tokenizer)
            try:
                fit_together(tokenizer, build(with_spec(generator, tokenizer.spec)))
            except ValueError:
                continue
        if config.tokenizer["_target_"] == own["_target_"]:
            continue
        over = [setting for setting in settings if setting.startswith("tokenizer=")]
        beneath = [setting for setting in settings if setting not in over]
        checkpoint = folder / "runs" / "_".join([config.name, *beneath]).replace("=", "_")
        if not checkpoint.exists():
            trained(config.name, *beneath, f"run_dir={checkpoint}")
        spec = asdict(tokenizer.spec) | {"shape": list(tokenizer.spec.shape)}
        run = trained(experiment, *over, f"run_dir=runs/{experiment}_{checkpoint.name}", f"cache={checkpoint}/cache",
                      f"tokenizer_checkpoint={checkpoint}", f"tokenizer_experiment={config.name}",
                      *(f"++generator.spec.{name}={value}" for name, value in spec.items()))
        register_run(run)
        images, counts = load(run, overrides=small(None, run)).sample(LABELS)
        assert images.dtype == torch.uint8 and len(images) == len(LABELS) and counts.steps > 0
        print(f"{experiment}: {config.name} {' '.join(settings)}")


def source_of(experiment: str) -> DictConfig:
    """The experiment that trains an experiment's tokenizer: the same one, or another."""
    config = catalogue.config_of("experiment", experiment)
    return config if config.tokenizer else catalogue.config_of("experiment", config.tokenizer_experiment)


def test_every_pair_that_fits_at_a_debug_size_is_trained_and_drawn_from() -> None:
    """The triples leave no pair of a debug tokenizer and a debug generator out that could be combined."""
    drawn = {(source_of(name).tokenizer["_target_"], catalogue.config_of("experiment", name).generator["_target_"])
             for name in TRAINED}
    tokenizers, generators = catalogue.every("tokenizer"), catalogue.every("generator")
    fitting = {(tokenizers[one]["_target_"], generators[other]["_target_"])
               for one, other in product(DEBUG_TOKENIZERS, DEBUG_GENERATORS)
               if catalogue.spec_of("tokenizer", one) == catalogue.spec_of("generator", other)
               and not get_class(generators[other]["_target_"]).needs_target}
    assert len(fitting) >= 14 and fitting <= drawn


@pytest.mark.parametrize("tokenizer", catalogue.names("tokenizer"))
def test_a_pair_fits_if_its_tokens_are_the_same_and_is_refused_else(tokenizer: str) -> None:
    ours = catalogue.spec_of("tokenizer", tokenizer)
    for generator in catalogue.names("generator"):
        theirs = catalogue.spec_of("generator", generator)
        if ours == theirs:
            require_same_tokens(ours, theirs)
            continue
        with pytest.raises(ValueError) as refused:
            require_same_tokens(ours, theirs)
        message = str(refused.value)
        assert f"the tokenizer makes {ours}; the generator expects {theirs}" in message
        assert f"varzoo list --tokens '{theirs}' names what fits" in message


@pytest.mark.parametrize("generator", DEBUG_GENERATORS)
def test_networks_are_composed_or_refused_as_their_configs_say(generator: str) -> None:
    with torch.device("meta"):
        network = build(catalogue.config_of("generator", generator))
    for name in DEBUG_TOKENIZERS:
        tokenizer = catalogue.on_meta("tokenizer", name)
        if catalogue.spec_of("tokenizer", name) == network.spec:
            fit_together(tokenizer, network)
        else:
            with pytest.raises(ValueError, match="tokenizer and generator do not fit"):
                fit_together(tokenizer, network)


def test_every_sampler_needs_what_some_generator_offers() -> None:
    classes = {catalogue.config_of("sampler", name)["_target_"] for name in catalogue.names("sampler")}
    offers = frozenset().union(*(catalogue.on_meta("generator", name).offers
                                 for name in catalogue.names("generator", "*_tiny")))
    for target in classes:
        kind: type[Sampler] = get_class(target)
        assert kind.needs <= offers, target
