"""What `python sample.py` does with its config: the images asked for, drawn and written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from varzoo.core.checkpoint import weights_hash
from varzoo.core.errors import unknown
from varzoo.eval.writers import NpzFile, PNGFolder, SampleWriter, save_grid
from varzoo.loading import Model, build, from_config, plain
from varzoo.rejection import Rejection
from varzoo.sampling import Request, draw
from varzoo.text import (
    CaptionIds,
    CaptionTokenizer,
    TextFeatures,
    cached_features,
    load_features,
    read_prompts,
    shortened,
)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OUTPUTS = ("grid", "folder", "npz")


def sample(config: DictConfig) -> Path:
    """Draw what the config says; returns the file or folder written."""
    if config.output not in OUTPUTS:
        raise unknown("output", config.output, OUTPUTS)
    if config.precision not in PRECISIONS:
        raise unknown("precision", config.precision, PRECISIONS)
    if config.guidance is not None:
        guidance = config.sampler.guidance  # one schedule, or one per phase
        for schedule in [guidance] if "_target_" in guidance else guidance.values():
            schedule.scale = config.guidance
    if config.tokens is not None:
        config.sampler.plan = {"_target_": "varzoo.generators.causal.Prefix", "tokens": config.tokens}
    model = from_config(config, config.checkpoint, config.tokenizer_checkpoint)
    if config.tokens is not None and not model.generator.spec.prefix_decodes:
        raise ValueError(f"tokens={config.tokens} is for tokens of which any prefix decodes; this model's are "
                         f"{model.generator.spec}. Leave it out.")
    model = place(model, config.device, PRECISIONS[config.precision])
    request = make_request(config, model)
    folder = (Path(config.checkpoint).parent if config.checkpoint else Path()) / "samples"
    if config.output == "grid":
        return draw_grid(config, model, request, Path(config.out or folder / f"grid_seed{config.seed}.png"))
    # Under a launcher of several processes each draws its share; an image is the same whoever draws it.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and config.output == "npz":
        raise ValueError("several processes write output=folder; pack it afterwards, or sample with one process.")
    out = Path(config.out or folder / f"seed{config.seed}{'.npz' if config.output == 'npz' else ''}")
    manifest = describe(config, model, request)
    writer: SampleWriter = (
        PNGFolder(folder=out, manifest=manifest) if config.output == "folder"
        else NpzFile(path=out, manifest=manifest, count=len(request), image_size=model.image_size))
    indices = writer.missing(range(rank, len(request), world_size))
    for samples in draw(model, request, seed=config.seed, batch_size=config.batch_size, indices=indices,
                        previews=previews_of(config), rejection=rejection_of(config), progress=rank == 0):
        labels = None if samples.labels is None else samples.labels.tolist()
        writer.write(samples.images, samples.numbers.tolist(), labels)
    writer.close()
    return out


def draw_grid(config: DictConfig, model: Model, request: Request, path: Path) -> Path:
    """Draw everything into one PNG, a row per label or prompt."""
    batches = draw(model, request, seed=config.seed, batch_size=config.batch_size, previews=previews_of(config),
                   rejection=rejection_of(config))
    images = torch.cat([samples.images for samples in batches])
    if request.prompts:
        names = [shortened(prompt) for prompt in request.prompts[::config.per_class]]
    elif request.labels is None:
        names = [""] * (len(images) // config.per_class or 1)
    else:
        rows = request.labels[::config.per_class]
        names = [model.class_names[label] if label < len(model.class_names) else str(label) for label in rows]
    save_grid(path, images, names)
    return path


def previews_of(config: DictConfig) -> Path | None:
    return None if config.previews is None else Path(config.previews)


def rejection_of(config: DictConfig) -> Rejection | None:
    return None if config.rejection is None else build(config.rejection)


def make_request(config: DictConfig, model: Model) -> Request:
    """The images asked for: `per_class` of every label, or of every prompt or row of text features."""
    given = [name for name in ("prompts", "features", "text_encoder") if config[name] is not None]
    if model.generator.num_classes is None:
        if config.labels is not None:
            raise ValueError("this model is conditioned on text and knows no labels: give prompts=FILE instead.")
        text = text_of(config)
        rows = torch.arange(len(text)).repeat_interleave(config.per_class)
        condition = text.condition(rows)
        model.generator.check_condition(condition)
        prompts = [text.prompts[row] for row in rows] if text.prompts else ()
        return Request(features=condition.features, mask=condition.mask, ids=condition.ids, prompts=prompts)
    if given:
        raise ValueError(f"this model is conditioned on classes, so it takes labels=[...] and no {' or '.join(given)}.")
    labels = range(model.generator.num_classes) if config.labels is None else config.labels
    model.generator.check_condition(Request(labels=list(labels)).condition(range(len(labels))))
    return Request(labels=[label for label in labels for _ in range(config.per_class)])


def text_of(config: DictConfig) -> TextFeatures | CaptionIds:
    """The text asked for: of prompts (features are kept, if there is a file to keep them in), or features of a file."""
    if config.prompts is None:
        if config.features is None or config.text_encoder is not None:
            raise ValueError("this model is conditioned on text: give prompts=FILE (one per line), or "
                             "features=FILE.safetensors without a text encoder.")
        return load_features(config.features)
    if config.text is None:
        raise ValueError("which text encoder is this model's? Name its config, as in text=t5_xl.")
    prompts, settings = read_prompts(config.prompts), config.text
    if config.text_encoder is not None:  # naming an encoder is also the leave to download it
        settings = OmegaConf.merge(settings, {"source": config.text_encoder})
        if "download" in settings:
            settings.download = True
    encoder = build(settings)
    if isinstance(encoder, CaptionTokenizer):
        if config.features is not None:
            raise ValueError("this model reads token ids of prompts, which are not kept in files: leave features out.")
        return encoder.encode(prompts)
    encoder = encoder.to(device=chosen_device(config.device), dtype=PRECISIONS[config.precision])
    return encoder.encode(prompts) if config.features is None else cached_features(config.features, prompts, encoder)


def chosen_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def place(model: Model, device: str, dtype: torch.dtype) -> Model:
    """Move all networks to the device; only weights change their dtype, tables stay float32."""
    for network in (model.tokenizer, model.generator, *model.sampler.networks):
        network.to(chosen_device(device))
    for network in (model.generator, *model.sampler.networks):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def describe(config: DictConfig, model: Model, request: Request) -> dict[str, Any]:
    """What identifies a set of samples: another run's output folder is refused by it."""
    asked = {name: tensor for name, tensor in vars(request.condition(range(len(request)))).items()
             if isinstance(tensor, torch.Tensor)}
    rejection = plain(config.rejection) if config.rejection else None
    # Named only where there are any: folders of older samples stay what they are.
    resize = {} if model.output_size is None else {"resize": model.resize}
    return ({"rejection": rejection} if rejection else {}) | resize | {
        "asked": weights_hash(asked), "generator": weights_hash(model.generator.state_dict()),
        "tokenizer": weights_hash(model.tokenizer.state_dict()),
        "drafts": [weights_hash(network.state_dict()) for network in model.sampler.networks],
        "sampler": plain(config.sampler), "decode": dict(config.decode or {}),
        "seed": config.seed,
        "precision": config.precision, "count": len(request), "uint8_rule": model.tokenizer.uint8_rule,
        "label_scheme": f"{config.per_class} per label, sorted"}
