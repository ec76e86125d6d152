"""Golden cases of OliverRensu/xAR, and of DiSA's fork of it."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.adapters.disa import annealed
from tests.golden_case import Case
from varzoo.core.checkpoint import load_strictly
from varzoo.core.draws import Recorded, RecordedDraws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Anneal, LinearInSteps, Step
from varzoo.generators.base import Batch, Condition
from varzoo.generators.units import Cells, to_map, to_tokens
from varzoo.generators.xar import XAR
from varzoo.nn.denoiser import time_frequencies
from varzoo.nn.flow import Euler, EulerMaruyama, FlowSolver, ShortGrid
from varzoo.nn.modulated_transformer import time_index
from varzoo.nn.rotary import axial_rows, rotate
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.training.optim import WarmupCosine


def build_xar(config: dict[str, Any]) -> XAR:
    """An xAR from the official constructor's arguments; dropout does not matter here."""
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    cells = round(config["clusters"] ** 0.5)
    assert config["encoder_embed_dim"] == config["decoder_embed_dim"]
    return XAR(spec=TokenSpec(kind="continuous", shape=(side, side), size=config["vae_embed_dim"]), num_classes=1000,
               unit=Cells(size=(side // cells, side // cells)), width=config["encoder_embed_dim"],
               heads=config["encoder_num_heads"], encoder_depth=config["encoder_depth"],
               decoder_depth=config["decoder_depth"], mlp_ratio=config["mlp_ratio"], class_drop=0.1,
               attention_dropout=0.0, projection_dropout=0.0)


def loaded_xar(case: Case) -> XAR:
    model = build_xar(case.config)
    load_strictly(model, model.key_maps()["xar"].to_ours(case.state_dict), "the case")
    return model


def in_raster(cells: Tensor, model: XAR) -> Tensor:
    """Values `[..., cell, B, n, C]` as `[..., B, N, C]` in raster order, as draws are recorded."""
    return model.layout.merge(rearrange(cells, "cell b n c -> b (cell n) c"))


def cells(case: Case) -> dict[str, Any]:
    model, latents = build_xar(case.config), case.inputs["latents"]
    sequence = model.layout.split(to_tokens(latents))
    return {"cells": sequence.unflatten(1, (len(model.layout.sizes), -1)),
            "restored": to_map(model.layout.merge(sequence), model.spec.shape)}


def mask_rope(case: Case) -> dict[str, Any]:
    side, head_dim, x = case.config["pt_seq_len"], 2 * case.config["dim"], case.inputs["x"]
    layout = Cells(size=(side // 2, side // 2)).layout((side, side))
    rows = axial_rows(layout.coordinates, head_dim)
    turn, x, (start, stop) = layout.turn, x.transpose(1, 2), (layout.sizes[0], 3 * layout.sizes[0])
    return {"allowed": turn <= turn[:, None], "cos": rows[..., 0].repeat_interleave(2, 1),
            "sin": rows[..., 1].repeat_interleave(2, 1), "rotated": rotate(x, rows).transpose(1, 2),
            "rotated_part": rotate(x[:, start:stop], rows[start:stop]).transpose(1, 2)}


def time_embed(case: Case) -> dict[str, Any]:
    model, times = loaded_xar(case), case.inputs["t"]
    return {"index": time_index(times), "sinusoid": time_frequencies(time_index(times)),
            "embedding": model.time_vectors(times)}


def block(case: Case) -> dict[str, Any]:
    model, x = loaded_xar(case), case.inputs["x"]
    block, rows = model.backbone.encoder_blocks[0], model.backbone.rotary
    modulation = model.backbone.modulations(case.inputs["condition"][None])[0][:, model.turn]
    return {"out": block(x, modulation, rows, model.visible), "attn_out": block.attn(x, rows, model.visible),
            "mlp_out": block.mlp(x)}


def train_forward(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_xar(case)
    size, length = len(inputs["labels"]), model.spec.length
    times = rearrange(inputs["t"], "(cell b) -> b cell", b=size)
    draws = RecordedDraws({
        "time": Recorded(torch.logit(times.double()), "batch"), "drop_label": Recorded(inputs["label_u"], "batch"),
        "noise": Recorded(in_raster(inputs["noise"], model), "batch pos"),
    }, samples=tuple(range(size)))
    seen: dict[str, Tensor] = {}
    model.backbone.encoder_norm.register_forward_hook(lambda module, given, output: seen.update(hidden=output))
    model.head.register_forward_hook(lambda module, given, output: seen.update(velocity=output))
    batch = Batch(tokens=to_tokens(inputs["latents"]), condition=Condition.classes(inputs["labels"]))
    total = model.loss(batch, draws, progress=0.0).total
    total.backward()
    assert seen["velocity"].shape[1] == length
    return {"hidden_cell0": seen["hidden"][:, :model.layout.sizes[0]], "velocity": seen["velocity"],
            "loss": total[None], "grad_z_proj": model.backbone.token_embed.weight.grad,
            "grad_pred_bias": model.head.bias.grad, "grad_time": model.time_embed.linear_2.bias.grad}


@torch.no_grad()
def kv_cache(case: Case) -> dict[str, Any]:
    inputs, model = case.inputs, loaded_xar(case).eval()
    cell, labels = inputs["cell"].item(), Condition.classes(inputs["labels"])
    draws = RecordedDraws({}, samples=tuple(range(len(inputs["labels"]))))
    decoding = model.begin(labels, draws=draws)
    size = model.layout.sizes[0]
    for step in decoding.steps:
        network = decoding.predict(step).network_at(torch.tensor([1.0, inputs["t_second"].item()]), 1)
        if step.index == cell:
            first, second = network(inputs["x_first"], 0, 1)[0], network(inputs["x_second"], 1, 1)[0]
            break
        clean = inputs["clean"][:, step.index * size:(step.index + 1) * size]
        network(clean, 0, 1)
        decoding.commit(step, clean)

    def uncached(x: Tensor, time: Tensor) -> Tensor:
        sequence = inputs["clean"].clone()
        sequence[:, cell * size:(cell + 1) * size] = x
        times = torch.zeros(len(sequence), len(model.layout.sizes))
        times[:, cell] = time
        velocity = model.velocity(sequence, times, model.class_embed(inputs["labels"]))
        return velocity[:, cell * size:(cell + 1) * size]

    return {"v_first": first, "v_second": second, "u_first": uncached(inputs["x_first"], torch.ones(())),
            "u_second": uncached(inputs["x_second"], inputs["t_second"]), "cache_len": [decoding.held[0] * size]}


def schedules(case: Case) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for index, steps in enumerate(case.inputs["num_steps"].tolist()):
        times = ShortGrid()(steps)
        outputs |= {f"times_{index}": times, f"index_{index}": time_index(times[:-1])}
    lr, epochs = case.config["lr"], case.inputs["epochs"].tolist()
    rate = WarmupCosine(warmup=case.config["warmup_epochs"], hold=600, total=800, floor=case.config["min_lr"] / lr)
    guidance = [[LinearInSteps(cfg)(step) for step in four_steps()] for cfg in case.inputs["cfg"].tolist()]
    return outputs | {"lr": torch.tensor([lr * rate(epoch) for epoch in epochs], dtype=torch.float64),
                      "guidance": torch.tensor(guidance, dtype=torch.float64)}


def four_steps() -> list[Step]:
    return Cells(size=(1, 1)).layout((2, 2)).steps(1, torch.device("cpu"))


def sample(case: Case, solver: FlowSolver, steps: int | Anneal) -> dict[str, Any]:
    """Full sampling; also what the network was asked and answered, of the first evaluations of every cell."""
    inputs, model = case.inputs, loaded_xar(case).eval()
    guidance, size = LinearInSteps(inputs["cfg"].item()), len(inputs["labels"])
    arrays = {"init_noise": Recorded(in_raster(inputs["init_noise"], model), "batch pos")}
    if "sde_noise" in inputs:
        noise = torch.stack([in_raster(part, model) for part in inputs["sde_noise"].unbind(1)])
        arrays["step_noise"] = Recorded(noise, "k batch pos")
    draws = RecordedDraws(arrays, samples=tuple(range(size)))
    seen: dict[str, list[Any]] = {"step": [], "evaluations": [], "index": [], "velocity_1": []}

    def watch(progress: Any) -> None:
        """Draw the step once more, from the prediction before it was committed, and look at its evaluations."""
        step = progress.step
        prediction = progress.decoding.predict(step)
        seen["step"].append(step)

        def network_at(times: Tensor, branches: int) -> Any:
            seen["index"].append(time_index(times))
            network = prediction.network_at(times, 2)

            def both(x: Tensor, k: int, asked: int) -> Tensor:
                velocities = network(x, k, 2)
                if k == 1:
                    seen["velocity_1"].append(velocities.flatten(0, 1))
                return velocities[:asked]

            return both

        again = type(prediction)(network_at=network_at, scale=prediction.scale, positions=prediction.positions,
                                 channels=prediction.channels, backbone_evaluations=0)
        drawn = again.draw(draws, steps=steps(step) if isinstance(steps, Anneal) else steps, solver=solver)
        seen["evaluations"].append(drawn.evaluations)

    sampler = Autoregressive(guidance=guidance, draw={"steps": steps, "solver": solver})
    sampled = sampler.sample(model, Condition.classes(inputs["labels"]), draws, callback=watch)
    assert sampled.counts.head_evaluations == sum(seen["evaluations"]) and sampled.counts.backbone_evaluations == 0
    outputs = {"tokens": to_map(sampled.tokens, model.spec.shape), "steps": seen["evaluations"],
               "guidance": torch.tensor([guidance(step) for step in seen["step"]], dtype=torch.float64)}
    if isinstance(steps, int):
        outputs |= {"times": solver.grid(steps), "time_index": torch.stack(seen["index"]),
                    "velocity_1": torch.stack(seen["velocity_1"])}
    return outputs


@torch.no_grad()
def sample_sde(case: Case) -> dict[str, Any]:
    return sample(case, EulerMaruyama(), case.inputs["num_steps"].item())


@torch.no_grad()
def sample_ode(case: Case) -> dict[str, Any]:
    return sample(case, Euler(), case.inputs["num_steps"].item())


@torch.no_grad()
def sample_disa(case: Case) -> dict[str, Any]:
    upper, lower = case.inputs["flow_upper_steps"].item(), case.inputs["flow_lower_steps"].item()
    return sample(case, EulerMaruyama(), Anneal(upper, lower, rounding="xar"))


def schedules_disa(case: Case) -> dict[str, Any]:
    outputs: dict[str, Any] = {
        f"steps_{row}": annealed(Anneal(upper, lower, rounding="xar"), 4)
        for row, (upper, lower) in enumerate(case.inputs["settings"].tolist())}
    return outputs | {"times_seen": ShortGrid()(case.inputs["num_steps"].item())[:-1].float()}


KINDS = {
    "xar/cells": cells,
    "xar/mask_rope": mask_rope,
    "xar/time_embed": time_embed,
    "xar/block": block,
    "xar/train_forward": train_forward,
    "xar/kv_cache": kv_cache,
    "xar/schedules": schedules,
    "xar/sample_sde": sample_sde,
    "xar/sample_sde_indices": sample_sde,
    "xar/sample_sde_indices_float32": sample_sde,
    "xar/sample_ode": sample_ode,
    "disa/schedules_xar": schedules_disa,
    "disa/xar_sample_disa": sample_disa,
}
