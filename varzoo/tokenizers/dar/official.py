"""D-AR's own files: their names of tensors, and a pickled configuration that overrides the published YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from varzoo.core.checkpoint import read_entry
from varzoo.core.keymap import Ignore, Rename, Rule

DEFAULTS = {"rope_base_len": 10000, "query_low_rank": False, "vq_enable": True, "output_resolution": 0}
NET_DEFAULTS = {"data_std": 1.0, "time_shift": 1.0, "mlp_head": False, "share_time_encoding": False,
                "rope_base_len": 10000, "in_dim": 3, "out_dim": 3}
FIXED = {"vq_enable": True, "output_resolution": 0, "in_dim": 3, "out_dim": 3}  # what is computed here
USAGE_BUFFER = 65536  # a log of used codes, which nothing reads
TRAINING = {"grad_checkpointing", "repa_layer", "cfg"}  # without effect on encoding and decoding


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Constructor arguments that an official file's configuration means, and remarks on what has no effect here.

    Raises:
        ValueError: it asks for what is not computed here.
    """
    config = read_entry(path, "config")
    if not isinstance(config, Mapping):
        return {}, ["it carries no configuration"]
    return settings(config.get("model", config))


def settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same, of the model's part of the configuration."""
    config = DEFAULTS | dict(config)
    net = NET_DEFAULTS | dict(config.pop("diff_decoder"))
    for name, value in FIXED.items():
        found = config.get(name, net.get(name))
        if found != value:
            raise ValueError(f"the file's configuration has {name}: {found}; here it is {value}.")
    groups, tokens = config.get("num_query_groups", config["num_denoising_steps"]), config["num_all_queries"]
    side, channels = config.get("sampling_resolution", 256), config["vq_dim"]
    said = {
        "image_size": [side, side], "codebook_size": config["vq_codebook_size"], "code_channels": channels,
        "data_std": net["data_std"], "steps": config["num_denoising_steps"],
        "segments": {"tokens": tokens, "groups": groups, "shift": net["time_shift"],
                     "group_size": config.get("queries_per_step", tokens // groups)},
        "encoder": {"image_size": [side, side], "queries": tokens, "code_channels": channels,
                    "patch_size": config["encoder_patch_size"], "width": config["encoder_dim"],
                    "depth": config["num_encoder_layers"], "rotary_base": config["rope_base_len"],
                    "query_rank": 8 if config["query_low_rank"] else None},
        "contexts": {"code_channels": channels, "queries": tokens, "width": config["decoder_dim"],
                     "depth": config["num_decoder_layers"]},
        "network": {"image_size": [side, side], "patch_size": net["patch_size"], "width": net["dim"],
                    "depth": net["depth"], "context_width": net["cond_dim"], "rotary_base": net["rope_base_len"],
                    "shared_time": net["share_time_encoding"], "modulated_output": net["mlp_head"]},
    }
    known = {"num_denoising_steps", "num_query_groups", "num_all_queries", "queries_per_step", "sampling_resolution",
             "vq_dim", "vq_codebook_size", "encoder_patch_size", "encoder_dim", "decoder_dim", "num_encoder_layers",
             "num_decoder_layers", "patch_size", "dim", "depth", "cond_dim", *DEFAULTS, *NET_DEFAULTS, *TRAINING}
    return said, [f"{name}={value!r} is not known here and has no effect" for name, value in (config | net).items()
                  if name not in known]


def rules(*, modulated_output: bool, repa: bool) -> list[Rule]:
    """Key map rules of the official layout; where there is no REPA head, a file's is left out."""
    matrix = {"convert": lambda weight: weight.flatten(1), "revert": lambda weight: weight[..., None, None]}
    attention = {"q": "q", "k": "k", "v": "v", "proj": "out", "q_norm": "q_norm", "k_norm": "k_norm"}
    found: list[Rule] = [
        Rename("patchify.{p}", "encoder.patchify.{p}"),
        Rename("query_embedding.weight", "encoder.query_table.weight"),
        Rename("query_linear.{p}", "encoder.query_projection.{p}"),
        Rename("quant_in_conv.weight", "encoder.head.weight", **matrix),
        Rename("quantize.embedding.weight", "embedding.weight"),
        Ignore("quantize.codebook_used", lambda: torch.zeros(USAGE_BUFFER)),
        Rename("quant_out_conv.weight", "contexts.from_codes.weight", **matrix),
        Rename("decoder_embedding.weight", "contexts.positions.weight"),
    ]
    for official, ours in (("encoder_layers", "encoder.blocks"), ("decoder_layers", "contexts.blocks")):
        names = {"norm1.{p}": "attention_norm.{p}", "norm2.{p}": "mlp_norm.{p}", "mlp.{rest*}": "mlp.{rest*}",
                 "gate1": "attention_gate", "gate2": "mlp_gate"}
        names |= {f"attention.{a}.{{p}}": f"attention.{b}.{{p}}" for a, b in attention.items()}
        found += [Rename(f"{official}.{{i}}.{a}", f"{ours}.{{i}}.{b}") for a, b in names.items()]
    net, block = "diff_decoder.net.", "blocks.{i}."
    names = {"cond_mlp.{p}": "context_in.{p}", "conv_in.bias": "input.bias",
             "time_embed.mlp.0.{p}": "time_embed.linear_1.{p}", "time_embed.mlp.2.{p}": "time_embed.linear_2.{p}",
             block + "time_embed.mlp.0.{p}": block + "time_embed.linear_1.{p}",
             block + "time_embed.mlp.2.{p}": block + "time_embed.linear_2.{p}",
             block + "cond_embed.{j}.{p}": block + "context_embed.{j}.{p}",
             block + "adaLN_modulation.1.{p}": block + "modulation.{p}", block + "mlp.{rest*}": block + "mlp.{rest*}"}
    for theirs, ours in (("attention", "attention"), ("cross_attn", "cross_attention")):
        names |= {f"{block}{theirs}.{a}.{{p}}": f"{block}{ours}.{b}.{{p}}" for a, b in attention.items()}
    found += [Rename(net + official, "network." + ours) for official, ours in names.items()]
    found.append(Rename(net + "conv_in.weight", "network.input.weight", **matrix))
    if not modulated_output:
        found += [Rename(net + "conv_out.weight", "network.head.weight", **matrix),
                  Rename(net + "conv_out.bias", "network.head.bias")]
    else:
        found += [Rename(net + "linear_out.linear.{p}", "network.head.{p}"),
                  Rename(net + "linear_out.adaLN_modulation.1.{p}", "network.output_modulation.{p}")]
    found.append(Rename(net + "repa_out.{rest*}", "repa.head.{rest*}") if repa else Ignore(net + "repa_out.{rest*}"))
    return found
