"""What an image costs, as counted without memory, is what a real decoding of a tiny network costs."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varzoo import catalogue, costs
from varzoo.cli.zoo import main
from varzoo.core.draws import Draws
from varzoo.loading import build, compose_config
from varzoo.nn.few_rows import FewRowsLinear

DRAWING = [name for name in catalogue.names("experiment", "smoke_*")
           if (node := catalogue.config_of("experiment", name).generator) is not None
           and not get_class(node["_target_"]).needs_target]
SMALL = {"plan": {"steps": 3}, "draw": {"steps": 3}}


def counting() -> FlopCounterMode:
    """Torch's counter, which leaves the CPU's attention out."""
    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention})


def as_linear(network: nn.Module) -> nn.Module:
    """Few-row products as they are elsewhere: on a CPU a single row goes twice."""
    for module in network.modules():
        if isinstance(module, FewRowsLinear):
            module.forward = MethodType(nn.Linear.forward, module)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("experiment", DRAWING)
def test_sampling_costs_what_it_costs_in_earnest(experiment: str) -> None:
    config = catalogue.config_of("experiment", experiment).copy()
    for section, settings in SMALL.items():
        for name, value in settings.items():
            if config.sampler.get(section) is not None and name in config.sampler[section]:
                config.sampler[section][name] = value
    source = config if config.tokenizer else compose_config("train", [f"experiment={config.tokenizer_experiment}"])
    sampler = build(config.sampler)
    with torch.device("meta"):
        unreal = build(config.generator)
        codebook = build(source.tokenizer).codebook() if unreal.embeds_codebook else None
    cost = costs.of_sampling(unreal, sampler, codebook)

    real = as_linear(build(config.generator))
    if real.embeds_codebook:
        real.use_codebook(torch.randn(codebook.shape))
    with counting() as counter:
        counts = sampler.sample(real, costs.any_condition(real), Draws(0, (0,))).counts
    assert (cost.steps, cost.backbone, cost.head) == (
        counts.steps, counts.backbone_evaluations, counts.head_evaluations)
    assert cost.backbone <= cost.backbone_passes <= 2 * cost.backbone
    assert cost.head <= cost.head_passes <= 2 * cost.head
    assert cost.unguided_flops <= cost.flops
    if experiment == "smoke_resgen":  # quantises what it drew, which is no evaluation of its network
        assert 0 < cost.flops < counter.get_total_flops()
    else:
        assert cost.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", catalogue.names("tokenizer", "*_f?") + catalogue.names("tokenizer", "*_tiny"))
def test_tokenizing_costs_what_it_costs_in_earnest(name: str) -> None:
    config = catalogue.config_of("tokenizer", name)
    with torch.device("meta"):
        unreal = build(config)
    cost = costs.of_tokenizer(unreal)
    real = as_linear(build(config))
    measured = []
    with torch.no_grad():
        with counting() as counter:
            tokens = real.encode(torch.zeros(1, 3, *real.image_size))
        measured.append(counter.get_total_flops())
        with counting() as counter:
            real.decode(tokens, Draws(0, (0,)))
        measured.append(counter.get_total_flops())
    assert list(cost) == measured


def test_a_transformer_costs_what_its_formula_says() -> None:
    """LlamaGen-B: 2 FLOPs per weight of the blocks and token fed, the head once per step, attention over the past."""
    cost = catalogue.sampling_cost("llamagen_b")
    width, depth, hidden, codes, steps = 768, 12, 2048, 16384, 256
    linear = 2 * depth * (4 * width * width + 3 * width * hidden) * steps
    attention = depth * 4 * width * sum(range(1, steps + 1))
    assert cost.flops == 2 * (linear + attention) + 2 * width * codes * steps
    assert cost.unguided_flops == linear + attention + 2 * width * codes * steps
    assert (cost.backbone, cost.backbone_passes, cost.head) == (256, 512, 0)


def test_branches_are_counted_where_they_run() -> None:
    cost = catalogue.sampling_cost("xar_b")  # linear guidance: the first of four cells is not guided
    assert (cost.steps, cost.head, cost.head_passes) == (4, 160, 280)


def test_info_says_what_an_image_costs_and_how_it_was_verified(capsys: pytest.CaptureFixture) -> None:
    main(["info", "xar_b"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 AR steps: 0 of the backbone, 160 of the head per image" in printed and "0 and 280" in printed
    assert "4.36 TFLOPs per image for its tokens, guidance included (2.48 TFLOPs without)" in printed
    assert "golden cases of the official code on tiny models (xar/* in tests/goldens)" in printed
    assert "licence: not stated" in printed and "arXiv 2502.20388" in printed
    main(["info", "kl_f2"])
    assert "to encode an image" in capsys.readouterr().out


def test_golden_cases_are_named_for_every_system() -> None:
    systems = {get_class(node["_target_"]) for kind in catalogue.NETWORKS for node in catalogue.every(kind).values()}
    assert {system.__name__ for system in systems if not system.goldens} == {"FlexTokAR", "ResGen", "TokenShuffle"}
    for system in systems:
        for pattern in system.goldens:
            assert any(catalogue.GOLDENS_FOLDER.glob(pattern)), (system, pattern)
