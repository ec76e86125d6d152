"""What an image costs: network evaluations and FLOPs, counted by running the code itself on tensors without memory.

The weights know their shapes alone (`Shaped`), and so does what is computed from them; orders, positions and times stay
numbers. So a decoding takes the very steps that it takes with weights, at any size of the network, in seconds.

FLOPs are those of matrix products, convolutions and attention, a multiply-add as two (`torch.utils.flop_counter`);
attention counts every pair of a query and a key that it is given, masked or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from varzoo.core.draws import Draws
from varzoo.core.steps import Step, at_step, options_of_phase
from varzoo.generators.base import Condition, Generator
from varzoo.generators.conditioners import CaptionPrefix
from varzoo.nn.kv_cache import KVCache
from varzoo.samplers.autoregressive import Autoregressive
from varzoo.samplers.base import GuidanceSetting
from varzoo.tokenizers.base import Tokenizer

aten = torch.ops.aten
Network = TypeVar("Network", bound=nn.Module)


class Tally:
    """What has been counted so far.

    Attributes:
        flops: FLOPs.
        rows: of every list of layers, in how many rows (a row per branch of guidance) they were evaluated.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.rows: Counter[Hashable] = Counter()

    def since(self, before: Tally) -> Tally:
        """What came after a copy was made."""
        after = Tally()
        after.flops, after.rows = self.flops - before.flops, self.rows - before.rows
        return after

    def copy(self) -> Tally:
        return self.since(Tally())

    def add(self, other: Tally) -> None:
        self.flops += other.flops
        self.rows += other.rows

    def branches(self, single: Tally) -> float:
        """How many branches of guidance there were on average, beside the same without guidance; 1 without layers."""
        return max((self.rows[stack] / single.rows[stack] for stack in single.rows), default=1.0)


class Shaped(Tensor):
    """A tensor of a shape, on no device in particular: every operation on it gives shapes, and its FLOPs are counted.

    It says that it is on the CPU, so that what is made beside it are numbers.
    """

    shape_only: Tensor
    tally: Tally

    @staticmethod
    def __new__(cls, shape_only: Tensor, tally: Tally) -> Shaped:
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape_only.size(), strides=shape_only.stride(), storage_offset=shape_only.storage_offset(),
            dtype=shape_only.dtype, device=torch.device("cpu"))
        made.shape_only, made.tally = shape_only, tally
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation leaves the class out
            cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (),
            kwargs: dict[Any, Any] | None = None) -> Any:
        tally = next(tensor.tally for tensor in _tensors((args, kwargs)) if isinstance(tensor, Shaped))
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = (args[0], _numbered(args[1]), *args[2:])
        shapes, named = _mapped(args, _shape_only), _mapped(kwargs, _shape_only)
        shortcut = SHORTCUTS.get(func.overloadpacket)
        result = func(*shapes, **named) if shortcut is None else shortcut(*shapes)
        if func.overloadpacket in FLOPS:
            tally.flops += FLOPS[func.overloadpacket](*shapes, **named, out_val=result)
        if func._schema.name.endswith("_"):  # in place
            return args[0]
        return _mapped(result, lambda tensor: Shaped(tensor, tally))


def _elementwise(*args: Any) -> Tensor:
    tensors = [value for value in args if isinstance(value, Tensor)]
    dtypes = [tensor.dtype for tensor in tensors if tensor.ndim] or [tensors[0].dtype]
    return torch.empty(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)), device="meta",
                       dtype=reduce(torch.promote_types, dtypes))


def _layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(*x.shape[:-len(rest[0])], *(1 for _ in rest[0]))
    return torch.empty_like(x), statistics, statistics


def _mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    dims = range(x.ndim) if not dims else [dim % x.ndim for dim in dims]
    sides = [1 if dim in dims else side for dim, side in enumerate(x.shape) if keepdim or dim not in dims]
    return x.new_empty(sides)


# The CPU's attention, which torch does not count, costs what any other does.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry, aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[aten._scaled_dot_product_flash_attention]}
# What torch works out in Python for each shape anew, slowly: the shapes that these give.
SHORTCUTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.add, aten.sub, aten.mul, aten.pow, aten.gelu, aten.silu, aten.rsqrt, aten.lerp),
                    _elementwise),
    aten.native_layer_norm: _layer_norm, aten.mean: _mean,
    aten.where: lambda mask, *values: _elementwise(*values).expand(torch.broadcast_shapes(
        mask.shape, *(value.shape for value in values))),
    aten.addmm: lambda bias, left, right: left.new_empty(len(left), right.shape[1])}


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with its tensors changed, within tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _mapped(getattr(value, part.name), change) for part in fields(value)
                                 if part.init})
    return value


def _numbered(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices of an operation, masks of known values as the numbers that they stand for."""
    numbered: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, Shaped):
            numbered += index.nonzero(as_tuple=True)
        else:
            numbered.append(index)
    return numbered


def _shape_only(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Shaped):
        return tensor.shape_only
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _likeness(value: Any) -> Hashable:
    """What of an argument bears on the cost of a layer: shapes, and which cells of a cache are read."""
    if isinstance(value, Tensor):
        return (*value.shape, value.dtype)
    if isinstance(value, KVCache):
        return (value.reach, *value.keys.shape)
    if isinstance(value, tuple | list):
        return tuple(map(_likeness, value))
    if is_dataclass(value):
        return (type(value), *(_likeness(getattr(value, part.name)) for part in fields(value)))
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value  # a layer's number


def without_memory(network: Network, tally: Tally) -> Network:
    """A network built on the meta device, in place, as one whose cost is counted in `tally`.

    Layers of one list whose weights and arguments have the same shapes cost the same, so one of them is run. Linear
    layers are as `nn.Linear` has them: how a CPU takes the product is no matter of the network.
    """
    linear: dict[Hashable, tuple[Tally, Any]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(Shaped(parameter.data, tally), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = Shaped(buffer, tally)
        if isinstance(module, nn.Linear):
            plain = MethodType(nn.Linear.forward, module)
            kind: tuple[Any, ...] = (module.weight.shape, module.bias is None)
            module.forward = _remembered(plain, kind, linear, tally)  # type: ignore[method-assign]  # of this one
    for stack in [module for module in network.modules() if isinstance(module, nn.ModuleList)]:
        costs: dict[Hashable, tuple[Tally, Any]] = {}
        for layer in stack:
            weights = tuple(tensor.shape for tensor in layer.state_dict().values())
            for name in _methods(type(layer)):
                kind = (id(stack), type(layer), name, weights)
                setattr(layer, name, _remembered(getattr(layer, name), kind, costs, tally))
    return network.eval()


def _methods(layer: type[nn.Module]) -> list[str]:
    """Names of what a layer computes: `forward`, and public methods of its own."""
    own = [kind for kind in layer.__mro__ if kind not in nn.Module.__mro__]
    return sorted({name for kind in own for name, value in vars(kind).items()
                   if isinstance(value, FunctionType) and not name.startswith("_")})


def _remembered(forward: Callable[..., Any], kind: tuple[Any, ...], costs: dict[Hashable, tuple[Tally, Any]],
                tally: Tally) -> Callable[..., Any]:
    """A layer's forward that runs once per likeness of its arguments."""
    def remembered(*args: Any, **kwargs: Any) -> Any:
        likeness = (kind, _likeness(args), tuple(kwargs), _likeness(tuple(kwargs.values())))
        if likeness in costs:
            tally.add(costs[likeness][0])
        else:
            before = tally.copy()
            result = forward(*args, **kwargs)
            tally.rows[kind[0]] += sum(tensor.shape[0] for tensor in _tensors(result))
            costs[likeness] = tally.since(before), result
        return costs[likeness][1]

    return remembered


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """What the tokens of one image take.

    Attributes:
        steps: AR steps.
        backbone, head: evaluations; a guided one, with its null branch, counts once (as in `Counts`).
        backbone_passes, head_passes: the same, every branch of guidance counted.
        flops: of all of them.
        unguided_flops: what they would be without guidance.
    """

    steps: int
    backbone: int
    head: int
    backbone_passes: int
    head_passes: int
    flops: int
    unguided_flops: int


def of_sampling(generator: Generator, sampler: Autoregressive, codebook: Tensor | None = None,
                progress: Callable[[Iterable[Step]], Iterable[Step]] = iter) -> SamplingCost:
    """The cost of one image's tokens.

    Args:
        generator: built on the meta device; it is of no other use afterwards.
        sampler: draws them. Where guidance is 1 at a step, a generator runs one branch or two as it does in earnest.
        codebook: the tokenizer's, of a generator that embeds with it; on the meta device.
        progress: wraps the loop over the AR steps, as `tqdm` does.
    """
    tally = Tally()
    if codebook is not None:
        generator.use_codebook(codebook)
    without_memory(generator, tally)
    start, steps = _follow(generator, sampler, tally, sampler.guidance, progress)
    plain_start, plain = _follow(generator, sampler, tally, None, progress)
    return SamplingCost(
        steps=len(steps), backbone=sum(step.backbone for step in steps), head=sum(step.head for step in steps),
        backbone_passes=round(sum(step.backbone * step.predicted.branches(single.predicted)
                                  for step, single in zip(steps, plain))),
        head_passes=round(sum(step.head * step.drawn.branches(single.drawn) for step, single in zip(steps, plain))),
        flops=start + sum(step.flops for step in steps),
        unguided_flops=plain_start + sum(step.flops for step in plain))


@dataclass(frozen=True, kw_only=True)
class _StepCost:
    """Evaluations of a step, and what they took."""

    backbone: int
    head: int
    predicted: Tally
    drawn: Tally

    @property
    def flops(self) -> int:
        return self.predicted.flops + self.drawn.flops


@torch.no_grad()
def _follow(generator: Generator, sampler: Autoregressive, tally: Tally, guidance: GuidanceSetting,
            progress: Callable[[Iterable[Step]], Iterable[Step]]) -> tuple[int, list[_StepCost]]:
    """FLOPs of opening a decoding of one image, and its steps.

    What is drawn is zero; draws of the same shapes cost the same, so one of them is run. What a decoding does with
    drawn tokens is not counted.
    """
    draws, costs, known, opening = Draws(0, (0,)), [], {}, tally.flops
    decoding = generator.begin(any_condition(generator), draws=draws, guidance=guidance, plan=sampler.plan)
    opening = tally.flops - opening
    for step in progress(decoding.steps):
        before = tally.copy()
        prediction = decoding.predict(step)
        predicted, before = tally.since(before), tally.copy()
        options = {name: at_step(value, step)
                   for name, value in options_of_phase(sampler.draw, step.phase, generator.predicts).items()}
        likeness = (_likeness(prediction), repr(options))
        if likeness not in known:
            drawn = prediction.draw(draws, **options)
            known[likeness] = _mapped(drawn.tokens, _zeros), drawn.evaluations, tally.since(before)
        tokens, evaluations, cost = known[likeness]
        costs.append(_StepCost(backbone=prediction.backbone_evaluations, head=evaluations, predicted=predicted,
                               drawn=cost))
        decoding.commit(step, tokens, _mapped(prediction.carry, _zeros))
    return opening, costs


def any_condition(generator: Generator) -> Condition:
    """A condition that a generator takes, of one sample: its first class, a caption, or none."""
    if generator.num_classes is not None:
        return Condition.classes(torch.tensor([0]))
    conditioner = getattr(generator, "conditioner", None)
    if isinstance(conditioner, CaptionPrefix):
        return Condition.captions(torch.zeros(1, conditioner.length, dtype=torch.long))
    return Condition.nothing(1)  # the null features, as many as a caption's


@torch.no_grad()
def of_tokenizer(tokenizer: Tokenizer, **decode: Any) -> tuple[int, int]:
    """FLOPs of encoding and of decoding one image of the tokenizer's size.

    Args:
        tokenizer: built on the meta device; it is of no other use afterwards.
        decode: options of its `decode`.
    """
    tally = Tally()
    without_memory(tokenizer, tally)
    tokens = tokenizer.encode(Shaped(torch.empty(1, 3, *tokenizer.image_size, device="meta"), tally))
    encoding = tally.flops
    tokenizer.decode(_mapped(tokens, _zeros), Draws(0, (0,)), **decode)
    return encoding, tally.flops - encoding
