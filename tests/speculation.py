"""Tiny targets, drafts and samplers that the tests of speculative sampling share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from varzoo.core.draws import Draws
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant, Schedule
from varzoo.generators.base import Condition
from varzoo.generators.causal import CausalGenerator
from varzoo.generators.conditioners import ClassPrefix, TextPrefix
from varzoo.generators.dar import DAR
from varzoo.generators.drafter import Drafter
from varzoo.generators.elm import ELM
from varzoo.generators.flextok_ar import FlexTokAR
from varzoo.generators.llamagen import LlamaGen
from varzoo.generators.token_shuffle import TokenShuffle
from varzoo.predictions.categorical import filtered
from varzoo.samplers.speculative import (
    DynamicTree,
    DySpecTree,
    Eagle,
    Exact,
    Jacobi,
    ModelDraft,
    Sequences,
    Smaller,
    Speculative,
    StaticTree,
)
from varzoo.samplers.speculative.drafts import Draft
from varzoo.samplers.speculative.policies import Policy

WIDTH, HEADS, TEXT = 8, 1, 4
SMALL_TREE = [[0], [1], [0, 0], [0, 1], [1, 0]]


def shaken(model: nn.Module, seed: int, std: float = 0.5) -> nn.Module:
    """The model with weights that say something about its input (many begin at zero)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def grid(shape: tuple[int, ...], size: int, **rest: int) -> TokenSpec:
    return TokenSpec(kind="discrete", shape=shape, size=size, **rest)


def llamagen(shape: tuple[int, int] = (2, 2), size: int = 3, *, seed: int = 1, text: bool = False, std: float = 0.5,
             depth: int = 1) -> LlamaGen:
    conditioner = (TextPrefix(length=TEXT, channels=6, width=WIDTH, drop=0.1) if text
                   else ClassPrefix(num_classes=3, width=WIDTH, drop=0.1))
    return shaken(LlamaGen(spec=grid(shape, size), conditioner=conditioner, width=WIDTH, depth=depth, heads=HEADS,
                           multiple_of=8), seed, std)


def causal(kind: str, *, seed: int = 1, shape: tuple[int, int] | None = None, size: int = 5) -> CausalGenerator:
    """A target of every kind whose drafts can be verified."""
    rest = {"width": WIDTH, "depth": 1, "heads": HEADS, "multiple_of": 8, "norm_eps": 1e-5, "token_dropout": 0.0,
            "attention_dropout": 0.0, "mlp_dropout": 0.0}
    classes = ClassPrefix(num_classes=3, width=WIDTH, drop=0.1)
    if kind == "elm":
        return shaken(ELM(spec=grid(shape or (2, 3), size, depth=2), conditioner=classes, **rest), seed)
    if kind == "token_shuffle":
        def backbone(spec: TokenSpec) -> LlamaGen:
            return LlamaGen(spec=spec, conditioner=classes, **rest)
        return shaken(TokenShuffle(spec=grid(shape or (4, 6), size), backbone=backbone, window=2, blocks=1, z_loss=0.0),
                      seed)
    sequence = TokenSpec(kind="discrete", shape=(6,), size=5, prefix_decodes=True)
    made = {"dar": DAR, "flextok": FlexTokAR}
    return shaken(made[kind](spec=sequence, conditioner=classes, **rest), seed) if kind in made else llamagen((2, 3), 5)


def drafter(target: CausalGenerator, *, seed: int = 7, std: float = 0.5) -> Drafter:
    model = Drafter(spec=target.spec, width=WIDTH, depth=1, heads=HEADS, hidden=24, norm_eps=1e-5, bias=True,
                    table="embedding", noise=0.2, logits_weight=0.1, drop=0.1)
    return shaken(model, seed, std)


def draft(name: str, target: CausalGenerator, smaller: CausalGenerator | None = None) -> Draft:
    """Every way to draft, by name."""
    if name == "jacobi":
        return Jacobi(window=3, fill="random")
    if name == "jacobi_repeat":
        return Jacobi(window=3, fill="repeat")
    by, _, shape = name.partition("_")
    shapes = {"static": StaticTree(paths=SMALL_TREE), "dynamic": DynamicTree(top_k=2, depth=1, total=5),
              "dyspec": DySpecTree(top_k=2, depth=1, total=5), "chain": Sequences(length=2),
              "iid": Sequences(length=2, count=3)}
    model = Eagle(drafter=drafter(target)) if by == "eagle" else Smaller(generator=smaller or llamagen(
        target.spec.shape, target.spec.size, seed=5, text=target.num_classes is None))
    return ModelDraft(model=model, shape=shapes[shape])


DRAFTS = ("eagle_static", "eagle_dynamic", "eagle_dyspec", "eagle_chain", "eagle_iid", "smaller_static",
          "smaller_dynamic", "smaller_dyspec", "smaller_chain", "smaller_iid", "jacobi", "jacobi_repeat")


def sampler(draft: Draft, policy: Policy | None = None, *, scale: float = 1.5,
            guidance: Schedule | None = None, **draw: object) -> Speculative:
    return Speculative(draft=draft, policy=policy or Exact(), guidance=guidance or Constant(scale),
                       draw=draw)


def condition_of(model: CausalGenerator, size: int) -> Condition:
    if model.num_classes is not None:
        return Condition.classes(torch.arange(size) % 3)
    generator = torch.Generator().manual_seed(3)
    valid = torch.arange(TEXT) >= (torch.arange(size) % TEXT)[:, None]
    return Condition.text(torch.randn(size, TEXT, 6, generator=generator) * valid[..., None], valid)


def every_sequence(model: CausalGenerator) -> Tensor:
    ids = model.spec.length * model.spec.depth
    tokens = torch.tensor(list(itertools.product(range(model.spec.size), repeat=ids)))
    return tokens if model.spec.depth == 1 else tokens.unflatten(1, (-1, model.spec.depth))


@torch.no_grad()
def joint(model: CausalGenerator, label: int, scale: float, **options: object) -> Tensor:
    """The probability of every sequence, by teacher forcing."""
    tokens = every_sequence(model)
    condition = Condition.classes(torch.full((len(tokens),), label))
    null = model.logits(tokens, model.conditioner.null(condition))
    logits = null + scale * (model.logits(tokens, condition) - null)
    return filtered(logits, **options).softmax(-1).double().gather(
        -1, tokens[..., None])[..., 0].flatten(1).prod(dim=1)


def histogram(sampler: Speculative, model: CausalGenerator, runs: int, *, label: int = 1, batch: int = 25_000,
              seed: int = 0) -> Tensor:
    """How often every sequence was drawn in so many runs."""
    counts = torch.zeros(model.spec.size ** model.spec.length, dtype=torch.long)
    weights = model.spec.size ** torch.arange(model.spec.length).flip(0)
    for start in range(0, runs, batch):
        tokens = sampler.sample(model, Condition.classes(torch.full((batch,), label)),
                                Draws(seed, range(start, start + batch))).tokens
        counts += (tokens * weights).sum(dim=1).bincount(minlength=len(counts))
    return counts


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-square test; sequences that are expected fewer than 5 times are one class."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 5:  # too few even together
        assert observed[-1] <= 30
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def total_variation(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)

