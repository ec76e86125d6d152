"""Fully sharded training (FSDP2): each process keeps its share of the weights, of their average and of the optimizer.

A module is sharded in place, from outside: its blocks gather their weights for their own computation alone, the rest
is gathered once per step. What needs all weights at once (held-out losses, samples, exported files) asks for them by
`whole`.
Checkpoints hold full tensors in the layout of every other trainer, so that a run may go on under another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import register_pytree_node

from varzoo.core.losses import Losses
from varzoo.nn.processes import mean_over_processes

# FSDP gathers weights again when the gradient of an output arrives; it looks for outputs in pytrees.
register_pytree_node(Losses, lambda losses: ([losses.total], losses.parts),
                     lambda leaves, parts: Losses(total=next(iter(leaves)), parts=parts))

MODULATION = "modulation"  # what a block makes of time and condition alone, asked for before the block is called


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, with checkpoints of full tensors in one file."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def trained(self) -> LightningModule:
        """The module that is trained; the strategy has it before it is asked for any state."""
        assert self.lightning_module is not None
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of full tensors, on the first process; empty on the others, which take part."""
        state = self._gathered(self.trained.state_dict())
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._gathered(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.trained.state_dict()
        state = {name: shared_out(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.trained.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            state = {number: {name: shared_out(value, parameter) for name, value in saved["state"][number].items()}
                     for number, parameter in zip(numbers, parameters) if number in saved["state"]}
            optimizer.load_state_dict({**saved, "state": state})

    def _gathered(self, state: Mapping[str, Any]) -> Any:
        """A state with full tensors on the CPU of the first process; every process must ask for it."""
        def gather(tensor: DTensor) -> Tensor | None:
            full = tensor.full_tensor()
            return full.cpu() if self.is_global_zero else None
        return apply_to_collection(dict(state), DTensor, gather)


def shared_out(value: Any, like: Any) -> Any:
    """A full tensor as this process's share, the way `like` is sharded; anything that is not its size, as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of the stacks in a model (lists called `...blocks`), outermost only, all but the last of each stack.

    The last is not gathered by itself: backward begins with it (and masked models call its parts, for fewer rows).
    """
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and name.endswith("blocks"):
            yield from child[:-1]
        else:
            yield from blocks_of(child)


def shard(model: nn.Module, mesh: DeviceMesh, *, entry: str) -> None:
    """Shard a model in place over the mesh.

    Args:
        model: on any device, the same on every process.
        entry: name of the method that computes its losses.
    """
    for block in blocks_of(model):
        modulation = getattr(block, MODULATION, None)
        if isinstance(modulation, nn.Module):
            fully_shard(modulation, mesh=mesh)
        fully_shard(block, mesh=mesh)
        if modulation is not None and not isinstance(modulation, nn.Module):
            register_fsdp_forward_method(block, MODULATION)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, entry)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of whole parameters over all processes, as FSDP does those of shares."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad.copy_(mean_over_processes(parameter.grad))


def place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put parameters or buffers into a module by name, without copying."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensor)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by all their names, tied ones more than once."""
    return dict(model.named_parameters(remove_duplicate=False))


def follow_shards(copy: nn.Module, model: nn.Module) -> None:
    """Make the parameters of an unsharded copy shares too: copies of the model's."""
    clones = {parameter: nn.Parameter(parameter.detach().clone(), requires_grad=False) for parameter in
              model.parameters()}
    place(copy, {name: clones[parameter] for name, parameter in named(model).items()})


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The shares in a module that is not itself sharded become full parameters for a while; all processes take part."""
    shares = {name: parameter for name, parameter in named(model).items() if isinstance(parameter, DTensor)}
    distinct = dict.fromkeys(shares.values())  # in one order on all processes
    with torch.no_grad():
        full = {share: nn.Parameter(share.full_tensor(), requires_grad=False) for share in distinct}
    place(model, {name: full[share] for name, share in shares.items()})
    try:
        yield
    finally:
        place(model, shares)
