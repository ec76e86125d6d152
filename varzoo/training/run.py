"""A training run: from a composed config to a folder that holds everything it made.

    config.yaml             what was run
    checkpoints/last.ckpt   everything needed to go on
    logs/, tensorboard/     metrics (CSV, one file per resumption; TensorBoard)
    samples/                grids of samples, or of originals and reconstructions
    scores.jsonl            scores of a generator's samples, where the config asks for them
    curve.png               losses over the steps
    tokenizer.safetensors   the tokenizer: trained here, or copied so that the folder is complete by itself
    vae.safetensors         of a tokenizer over a VAE: that, copied
    generator.safetensors   the averaged weights, their config in the header

Started again with the same config, a run goes on where it was, or says that it is done; with another config, the folder
is refused.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from varzoo.core.checkpoint import atomic_path, read_config, save_weights, weights_hash
from varzoo.generators.base import Generator
from varzoo.loading import (
    GENERATOR_FILE,
    TOKENIZER_FILE,
    build,
    compose_config,
    equip,
    fit_together,
    load_generator,
    load_tokenizer,
    load_weights,
    node_of,
    plain,
)
from varzoo.tokenizers.base import Tokenizer
from varzoo.training.callbacks import ReconstructionGrid, SampleGrid, StepBar, plot_curves, read_metrics
from varzoo.training.data import ImageData, TokenData
from varzoo.training.generator import GeneratorTraining
from varzoo.training.module import TrainingModule
from varzoo.training.scoring import ScoreSamples
from varzoo.training.tokenizer import TokenizerTraining

# What may differ when a run is taken up again: where and how it runs, how often it reports, how long it is.
FREE = {"run_dir", "overwrite", "trainer", "num_workers", "steps", "log_every", "validate_every", "checkpoint_every",
        "samples_every", "scores", "tokenizer_checkpoint", "target_checkpoint", "cache", "accumulate"}

VAE_FILE = "vae.safetensors"

log = logging.getLogger(__name__)


def train(config: DictConfig) -> Path:
    """Train what the config says and return the run's folder.

    Raises:
        ValueError: the folder holds another run, or parts of the config do not fit together.
        FileNotFoundError: the tokenizer's checkpoint is missing and no experiment is named to make it.
        FloatingPointError: the loss became nan or infinite.
    """
    folder = Path(config.run_dir)
    primary = int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    if primary:
        check_folder(folder, config)
    done = (GENERATOR_FILE if config.generator is not None else TOKENIZER_FILE, config.steps)
    if trained_steps(folder / done[0]) == done[1]:
        log.info("%s is trained already (%d steps); overwrite=true trains it anew.", folder, config.steps)
        return folder
    torch.manual_seed(config.seed)
    module, data, pictures = (generator_parts if config.generator is not None else tokenizer_parts)(config, folder)
    if primary:
        with atomic_path(folder / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(config, resolve=True))
        if isinstance(module, GeneratorTraining):
            keep_tokenizer(config, folder / TOKENIZER_FILE, module.tokenizer, container(config, "tokenizer"))
        elif isinstance(module, TokenizerTraining) and module.model.beneath is not None:
            keep_tokenizer(config, folder / VAE_FILE, module.model.beneath, container(config, "tokenizer")["vae"])
    trainer = make_trainer(config, folder, module, [*pictures, StepBar(config.log_every)])
    last = folder / "checkpoints" / "last.ckpt"
    # Older Lightning versions have no `weights_only` and load as torch does by default: safely too.
    has_it = "weights_only" in inspect.signature(trainer.fit).parameters
    safely: dict[str, Any] = {"weights_only": True} if has_it else {}
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, **safely)
    with module.whole():
        if trainer.is_global_zero:
            export(config, folder, module, data)
    if trainer.is_global_zero:
        plot_curves(folder / "curve.png", read_metrics(folder / "logs"), config.name)
    trainer.strategy.barrier()
    return folder


def check_folder(folder: Path, config: DictConfig) -> None:
    """Raise ValueError if the folder holds something else; delete another run where the config says so."""
    path = folder / "config.yaml"
    mine = plain(config)
    if config.overwrite and path.exists():
        shutil.rmtree(folder)
    if path.exists():
        theirs: Any = OmegaConf.to_container(OmegaConf.load(path))
        different = [key for key in sorted(mine.keys() | theirs.keys())
                     if key not in FREE and mine.get(key) != theirs.get(key)]
        if different:
            raise ValueError(
                f"{folder} holds another run: {', '.join(different)} differ (see {path}). Choose another run_dir=..., "
                "or overwrite=true to delete it."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run's folder; choose another run_dir=...")


def trained_steps(path: Path) -> int | None:
    """The length of the finished run that wrote a weights file, None if there is none."""
    return (read_config(path) or {}).get("steps") if path.exists() else None


def tokenizer_parts(config: DictConfig, folder: Path) -> tuple[TokenizerTraining, ImageData, list[pl.Callback]]:
    """What trains a tokenizer, its VAE (if it has one) made first where an experiment for it is named."""
    tokenizer, vae = build(tokenizer_node(config, folder)), folder / VAE_FILE
    if tokenizer.beneath is not None:
        load_weights(tokenizer.beneath, find_tokenizer(config, vae)).train()  # a mode changes nothing but a warning
    objective = build(config.objective) if config.objective else None
    module = TokenizerTraining(tokenizer=tokenizer, objective=objective, clip=config.clip, **common(config, folder))
    data = ImageData(**image_settings(config))
    if not config.samples_every:
        return module, data, []
    return module, data, [ReconstructionGrid(every=config.samples_every, folder=folder / "samples",
                                             dataset=data.heldout)]


def generator_parts(config: DictConfig, folder: Path) -> tuple[GeneratorTraining, ImageData, list[pl.Callback]]:
    """What trains a generator, its tokenizer made first where an experiment for it is named."""
    generator, sampler, settings = build(config.generator), build(config.sampler), common(config, folder)
    images = image_settings(config)
    tokenizer = load_tokenizer(find_tokenizer(config, folder / TOKENIZER_FILE), config.tokenizer)
    fit_together(tokenizer, generator)
    equip(sampler, generator, tokenizer)
    if generator.needs_target:
        generator.use_target(load_target(config, tokenizer))
    elif config.target_checkpoint is not None:
        generator.use_target(generator)  # says that it takes none
    module = GeneratorTraining(generator=generator, tokenizer=tokenizer, posterior=config.posterior, **settings)
    data = TokenData(tokenizer=tokenizer, cache=Path(config.cache), copies=config.copies, **images)
    pictures: list[pl.Callback] = []
    if config.samples_every:
        pictures.append(SampleGrid(every=config.samples_every, folder=folder / "samples", sampler=sampler,
                                   class_names=data.train.class_names))
    if config.scores is not None:
        settings = {name: value for name, value in container(config, "scores").items() if name != "extractor"}
        pictures.append(ScoreSamples(path=folder / "scores.jsonl", sampler=sampler, dataset=data.train,
                                     extractor=build(config.scores.extractor), **settings))
    return module, data, pictures


def load_target(config: DictConfig, tokenizer: Tokenizer) -> Generator:
    """The generator that a drafter learns from, trained first if it is missing and its experiment is named."""
    if config.target_checkpoint is None:
        raise FileNotFoundError("a drafter learns from a trained generator: give target_checkpoint=RUN.")
    source = Path(config.target_checkpoint)
    path = source if source.is_file() else source / GENERATOR_FILE
    if not path.exists() and config.target_experiment is not None:
        log.info("no target at %s yet: training experiment=%s first", path, config.target_experiment)
        train(compose_config("train", [f"experiment={config.target_experiment}", f"run_dir={source}",
                                       f"tokenizer_checkpoint={config.tokenizer_checkpoint}", f"seed={config.seed}"]))
    learned, given = (read_config(path) or {}).get("tokenizer_hash"), weights_hash(tokenizer.state_dict())
    if learned not in (None, given):
        raise ValueError(f"the target {path} was trained with tokenizer {learned}, this is {given}: set "
                         f"tokenizer_checkpoint={source}.")
    return load_generator(path)


def tokenizer_node(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The config of the tokenizer to train; its VAE is as the VAE's own file says, measured scale included."""
    node = container(config, "tokenizer")
    if "vae" in node and (header := read_config(find_tokenizer(config, folder / VAE_FILE))) is not None:
        node["vae"] = header["tokenizer"]
    return node


def find_tokenizer(config: DictConfig, kept: Path) -> Path:
    """The file of the tokenizer that is modelled: the run's copy `kept`, or the one named.

    It is trained first if it is missing and its experiment is named.
    """
    if kept.exists():
        return kept
    if config.tokenizer_checkpoint is None:
        raise FileNotFoundError("this training needs tokenizer_checkpoint=FILE or a tokenizer's run folder: of the "
                                "tokenizer whose tokens are modelled.")
    source = Path(config.tokenizer_checkpoint)
    path = source if source.is_file() else source / TOKENIZER_FILE
    if not path.exists() and config.tokenizer_experiment is not None:
        log.info("no tokenizer at %s yet: training experiment=%s first", path, config.tokenizer_experiment)
        train(compose_config("train", [f"experiment={config.tokenizer_experiment}", f"run_dir={source}",
                                       f"seed={config.seed}"]))
    return path


def keep_tokenizer(config: DictConfig, path: Path, tokenizer: Tokenizer, node: Any) -> None:
    """Copy the tokenizer that is modelled into the run's folder, with its config."""
    if not path.exists():
        source = find_tokenizer(config, path)
        header = (read_config(source) or {}) | {"tokenizer": node_of(source, node)}
        save_weights(path, tokenizer.state_dict(), header)


def image_settings(config: DictConfig) -> dict[str, Any]:
    """Settings that both data modules take; `batch_size` images per optimizer step come in `accumulate` pieces."""
    return {"train": build(config.data.train), "heldout": build(config.data.heldout), "seed": config.seed,
            "batch_size": config.batch_size // config.accumulate, "num_workers": config.num_workers}


def common(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Settings that all training modules take."""
    return {"optimizer": build(config.optimizer), "learning_rate": build(config.learning_rate), "steps": config.steps,
            "seed": config.seed, "ema_decay": config.ema_decay, "folder": folder}


def make_trainer(config: DictConfig, folder: Path, module: TrainingModule, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's trainer over steps, not epochs; clipping is the module's where it optimises by hand."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Checkpoints after the step are what we want; the other is a message between Lightning and torch.
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    checkpoints = ModelCheckpoint(folder / "checkpoints", "last", every_n_train_steps=config.checkpoint_every,
                                  enable_version_counter=False)
    resumption = len(list((folder / "logs").glob("*")))
    loggers = [CSVLogger(folder, "logs", f"part_{resumption:03d}"), TensorBoardLogger(folder, "tensorboard", "")]
    return pl.Trainer(
        **build(config.trainer), max_steps=config.steps, logger=loggers,
        callbacks=[checkpoints, LearningRateMonitor("step"), *callbacks], default_root_dir=folder,
        gradient_clip_val=config.clip if module.automatic_optimization else None,
        accumulate_grad_batches=config.accumulate, val_check_interval=config.validate_every,
        check_val_every_n_epoch=None, log_every_n_steps=config.log_every, num_sanity_val_steps=0,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False)


def container(config: DictConfig, name: str) -> Any:
    """A resolved node as plain dicts and lists."""
    return None if config[name] is None else plain(config[name])


def export(config: DictConfig, folder: Path, module: TrainingModule[Any], data: ImageData) -> None:
    """Write the averaged weights with everything needed to build their model."""
    about = {"run": config.name, "steps": config.steps, "seed": config.seed}
    if isinstance(module, TokenizerTraining):
        tokenizer = module.averaged.eval()
        batches = (batch["image"].to(module.device) for batch in DataLoader(data.train, batch_size=256))
        measured = tokenizer.calibrate(batches)
        save_weights(folder / TOKENIZER_FILE, tokenizer.state_dict(),
                     {**about, "tokenizer": tokenizer_node(config, folder) | measured})
        return
    assert isinstance(module, GeneratorTraining)
    if module.averaged.needs_target:
        about["target_hash"] = weights_hash(module.averaged.target.state_dict())
    save_weights(folder / GENERATOR_FILE, module.averaged.state_dict(),
                 {**about, "generator": container(config, "generator"), "sampler": container(config, "sampler"),
                  "tokenizer_hash": weights_hash(module.tokenizer.state_dict()),
                  "class_names": list(data.train.class_names)})
