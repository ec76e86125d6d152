"""FlexTok's official files: the names of their tensors, and what their configuration says.

A file carries its configuration as a tree of constructors, in the safetensors header or in config.json beside it. The
tree is read, never instantiated: every constructor in it is looked up here by its class name, and what it says is
compared with what the code computes. The trees of the released files could not be read when this was written; what was
assumed of them stands in `FIXED` and in the configs, and where a file disagrees it is said.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

from safetensors import safe_open

from varzoo.core.keymap import Computed, Concat, Ignore, Rename, Rule
from varzoo.tokenizers.flextok.networks import FlowDecoder, RegisterEncoder

Tree = Mapping[str, Any]
PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
HERE = "varzoo.tokenizers.flextok"
LAWS = {"uniform": "uniform", "pow2": "powers_of_two", "uniform_pow2": "rounded_up"}

# What the code computes, by constructor and argument; a tree that says otherwise is refused. An argument that a tree
# leaves out has the official default, which is the value here.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "LinearHead": {"use_mup_readout": (False,)},
    "ToPatchesLinearHead": {"use_mup_readout": (False,)},
    "TimestepEmbedder": {"max_timestep": (1.0,), "max_period": (256,), "frequency_embedding_size": (256,)},
    "PositionalEmbeddingAdder": {"posemb_type": ("sincos", "learnable_sum")},
    "Registers1D": {"ordering_mode": ("nested",)},
    "BlockWiseSequencePacker": {"mask_mode": ("causal_last", "full")},
    "FlexTransformer": {"adaLN_expansion": (1, 2)},
    "StableDiffusionVAE": {}, "PatchEmbedder": {}, "LinearLayer": {}, "MaskedNestedDropout": {}, "LearnedNullCond": {},
    "PerSampleOp": {}, "SequenceUnpacker": {}, "FSQ": {}, "MinRFNoiseModule": {}, "MinRFPipeline": {}, "MLPHead": {},
    "SequentialModuleDictWrapper": {}, "channels_first_to_last": {}, "channels_last_to_first": {},
}
# Arguments that are read, or that change nothing here. Others are reported.
READ = {
    "dim", "depth", "head_dim", "mlp_ratio", "channels_in", "channels_out", "patch_sizes", "flatten_patches",
    "max_sizes", "posemb_scaling", "n_min", "n_max", "size_sampling_mode", "dim_in", "dim_out", "dropout_prob",
    "replace_with_single_token", "levels", "drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "ln",
    "stratisfied", "mode_scale", "latent_channels", "scaling_factor", "sample_posterior", "weight_init_style",
    "intermediate_layers", "module_dict", "pad_to_multiple", "compile_block_mask", "return_materialized_mask",
    "per_sample_op", "per_subseq_embs", "out_channels", "use_flex_attention", "packed_call", "frozen",
    "use_act_checkpoint",
}
EXPECTED_ORDER = ("LinearLayer", "PositionalEmbeddingAdder", "MaskedNestedDropout", "LearnedNullCond",
                  "FlexTransformer")


def encoder_rules(encoder: RegisterEncoder, ours: str = "encoder.") -> list[Rule]:
    """Names of the encoder's tensors; our names begin with `ours`."""
    official = "encoder.module_dict."
    return [
        Rename(f"{official}enc_patch_emb.patch_proj.{{p}}", f"{ours}patches.projection.{{p}}"),
        Computed(f"{official}enc_posemb_module.posembs", lambda: encoder.patches.table[None]),
        Rename(f"{official}enc_register_module.registers", f"{ours}registers"),
        *_transformer(f"{official}enc_transformer", ours),
        Rename(f"{official}enc_to_latents.proj.{{p}}", f"{ours}head.{{p}}"),
    ]


def decoder_rules(decoder: FlowDecoder, ours: str = "decoder.") -> list[Rule]:
    """Names of the decoder's tensors; our names begin with `ours`."""
    official = "decoder.module_dict."
    return [
        Rename(f"{official}dec_from_latents.proj.{{p}}", f"{ours}from_codes.{{p}}"),
        Rename(f"{official}dec_registers_posemb_module.posembs", f"{ours}positions",
               convert=lambda table: table[0, 0].T.contiguous(), revert=lambda table: table.T[None, None].contiguous()),
        Rename(f"{official}dec_nested_dropout.dropout_mask_token", f"{ours}mask_token"),
        Rename(f"{official}dec_latent_dropout.nullcond", f"{ours}null_token"),
        Rename(f"{official}dec_noise_patch_emb.patch_proj.{{p}}", f"{ours}patches.projection.{{p}}"),
        Computed(f"{official}dec_patches_posemb_module.posembs", lambda: decoder.patches.table[None]),
        Rename(f"{official}dec_time_embedder.mlp.0.{{p}}", f"{ours}time_embed.linear_1.{{p}}"),
        Rename(f"{official}dec_time_embedder.mlp.2.{{p}}", f"{ours}time_embed.linear_2.{{p}}"),
        *_transformer(f"{official}dec_transformer", ours),
        Rename(f"{official}dec_transformer.blocks.{{i}}.adaLN_modulation.1.{{p}}",
               f"{ours}blocks.{{i}}.modulation.{{p}}"),
        Rename(f"{official}dec_to_patches.adaLN_modulation.1.{{p}}", f"{ours}head_modulation.{{p}}"),
        Rename(f"{official}dec_to_patches.proj.{{p}}", f"{ours}head.{{p}}"),
    ]


def rules(encoder: RegisterEncoder, decoder: FlowDecoder) -> list[Rule]:
    """Names of a whole file. The published REPA head, which a file may still hold, is ignored: its form is unknown."""
    return [
        Rename("vae.vae.{rest*}", "vae.{rest*}"), *encoder_rules(encoder), *decoder_rules(decoder),
        Rename("repa.{rest*}", "repa.{rest*}"),
        Ignore("decoder.module_dict.{m}.mlp.{rest*}"), Ignore("decoder.module_dict.{m}.out_proj.{rest*}"),
    ]


def _transformer(official: str, ours: str) -> list[Rule]:
    block, mine = f"{official}.blocks.{{i}}", f"{ours}blocks.{{i}}"
    return [
        Concat([f"{block}.attn.{name}.weight" for name in ("wq", "wk", "wv")], f"{mine}.attention.qkv.weight"),
        Rename(f"{block}.attn.proj.weight", f"{mine}.attention.out.weight"),
        *(Rename(f"{block}.mlp.{theirs}.weight", f"{mine}.mlp.{name}.weight")
          for theirs, name in (("fc1", "gate"), ("fc3", "up"), ("fc2", "down"))),
    ]


def read_tree(path: Path) -> Tree | None:
    """The configuration of an official file: its header's, else that of config.json beside it; None without either."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tree = {name: ast.literal_eval(text) for name, text in header.items() if name in PARTS}
        if tree:
            return tree
    beside = path.with_name("config.json")
    tree = json.loads(beside.read_text()) if beside.is_file() else {}
    return {name: tree[name] for name in PARTS if name in tree} or None


def settings(tree: Tree) -> tuple[dict[str, Any], list[str]]:
    """Constructor arguments of FlexTok as config nodes, of those parts that a tree has; and remarks on the rest of it.

    Raises:
        ValueError: the tree says what the code does not compute; every such place is named.
    """
    problems, remarks = check(tree)
    if problems:
        raise ValueError(f"this FlexTok computes something else than the file's configuration says: "
                         f"{'; '.join(problems)}. Its weights would give wrong images.")
    said: dict[str, Any] = {}
    if "encoder" in tree:
        said["encoder"] = encoder_settings(tree["encoder"])
    if "decoder" in tree:
        said |= decoder_settings(tree["decoder"])
    if "regularizer" in tree:
        said["quantizer"] = quantizer_settings(tree["regularizer"])
    if "flow_matching_noise_module" in tree:
        said["noise_levels"] = noise_settings(tree["flow_matching_noise_module"])
    if "vae" in tree:
        said["vae"] = vae_settings(tree["vae"], tree.get("_vae_base_cfg"))
        if said["vae"].get("scale") is None:
            said["vae"].pop("scale", None)
            remarks.append("the file does not say the scaling factor of its VAE")
    return said, remarks


def check(tree: Tree) -> tuple[list[str], list[str]]:
    """Where a tree contradicts `FIXED` or the order of the decoder, and what of it is unknown here."""
    problems, remarks, seen = [], [], []
    for path, node in _constructors({name: tree[name] for name in PARTS if name in tree}, ""):
        name = _name(node)
        if path.startswith("decoder."):
            seen.append(name)
        if name not in FIXED:
            problems.append(f"{path} is a {node['_target_']}, which is not known here")
            continue
        for argument, value in node.items():
            if argument in FIXED[name] and value not in FIXED[name][argument]:
                problems.append(f"{path}.{argument} is {value!r}, here {' or '.join(map(repr, FIXED[name][argument]))}")
            if argument not in READ and argument not in FIXED[name] and not argument.startswith("_") \
                    and not argument.endswith("_key") and not argument.endswith("_keys"):
                remarks.append(f"{path}.{argument}={value!r} is not known here and has no effect")
    places = [seen.index(name) for name in EXPECTED_ORDER if name in seen]
    if places != sorted(places):
        problems.append(f"the decoder's modules come in another order than {', '.join(EXPECTED_ORDER)}")
    return problems, remarks


def encoder_settings(part: Tree) -> dict[str, Any]:
    found = _by_name(part)
    transformer, head = found["FlexTransformer"], found["LinearHead"]
    return {"_target_": f"{HERE}.RegisterEncoder", **_patches(found), "registers": found["Registers1D"]["n_max"],
            "out_channels": head["dim_out"], **_sizes(transformer)}


def decoder_settings(part: Tree) -> dict[str, Any]:
    """The decoder, and the law of nested dropout and of the null condition, which stand in it."""
    found = _by_name(part)
    transformer, null = found["FlexTransformer"], found["LearnedNullCond"]
    decoder = {"_target_": f"{HERE}.FlowDecoder", **_patches(found),
               "registers": found["PositionalEmbeddingAdder:learnable_sum"]["max_sizes"][0],
               "code_channels": found["LinearLayer"]["dim_in"], **_sizes(transformer),
               "modulations": transformer.get("adaLN_expansion", 1),
               "single_null": null.get("replace_with_single_token", False)}
    said: dict[str, Any] = {"decoder": decoder}
    if "size_sampling_mode" in found["MaskedNestedDropout"]:
        said["kept"] = LAWS[found["MaskedNestedDropout"]["size_sampling_mode"]]
    if "dropout_prob" in null:
        said["null_drop"] = null["dropout_prob"]
    return said


def quantizer_settings(part: Tree) -> dict[str, Any]:
    return {"_target_": "varzoo.nn.fsq.FSQ", "levels": list(part["levels"]), "unrounded": part.get("drop_quant_p", 0.0),
            "corrupted": [part.get("min_corrupt_tokens_p") or 0.0, part.get("corrupt_tokens_p", 0.0)]}


def noise_settings(part: Tree) -> dict[str, Any]:
    laws, scale = "varzoo.nn.noise_levels", part.get("mode_scale", 0.0)
    if part.get("ln", True):
        return {"_target_": f"{laws}.{'StratifiedLogitNormal' if part.get('stratisfied') else 'LogitNormal'}"}
    return {"_target_": f"{laws}.Mode", "scale": scale} if scale else {"_target_": f"{laws}.Uniform"}


def vae_settings(part: Tree, config: Tree | None) -> dict[str, Any]:
    """The VAE; `config` is diffusers' own, where it is known (else widths and depths are those of our config)."""
    said = {"_target_": "varzoo.tokenizers.kl.KLTokenizer", "latent_channels": part["latent_channels"], "patch_size": 1,
            "scale": part.get("scaling_factor") or (config or {}).get("scaling_factor")}
    if config is not None:
        widths = config["block_out_channels"]
        said |= {"width": gcd(*widths), "multipliers": [width // gcd(*widths) for width in widths],
                 "blocks_per_level": config["layers_per_block"], "norm_groups": config["norm_num_groups"]}
    return said


def _patches(found: Mapping[str, Tree]) -> dict[str, Any]:
    patches, positions = found["PatchEmbedder"], found["PositionalEmbeddingAdder:sincos"]
    side, *others = patches["patch_sizes"]
    if others != [side]:
        raise ValueError(f"patches are square here, but the file's are {patches['patch_sizes']}.")
    return {"channels": patches["channels_in"], "patch_size": side, "position_grid": list(positions["max_sizes"]),
            "position_scaling": positions.get("posemb_scaling", "absolute")}


def _sizes(transformer: Tree) -> dict[str, Any]:
    return {"width": transformer["dim"], "depth": transformer["depth"], "head_dim": transformer.get("head_dim", 64),
            "mlp_ratio": transformer.get("mlp_ratio", 4.0)}


def _name(node: Tree) -> str:
    return node["_target_"].rsplit(".", 1)[-1]


def _by_name(part: Tree) -> dict[str, Tree]:
    """A part's modules by class name; position embeddings by their type as well."""
    found: dict[str, Tree] = {}
    for node in part["module_dict"].values():
        name = _name(node)
        found[f"{name}:{node['posemb_type']}" if "posemb_type" in node else name] = node
    missing = {"FlexTransformer", "PatchEmbedder", "PositionalEmbeddingAdder:sincos"} - found.keys()
    if missing:
        raise ValueError(f"the file's configuration has no {', '.join(sorted(missing))}.")
    return found


def _constructors(node: Any, path: str) -> list[tuple[str, Tree]]:
    """Every constructor of a tree, with its path."""
    if not isinstance(node, Mapping):
        return []
    own = [(path, node)] if "_target_" in node else []
    return own + [entry for name, child in node.items()
                  for entry in _constructors(child, f"{path}.{name}".lstrip("."))]
