"""Several processes: sums over the global batch, and parameters of which each process has a part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from camex_ft.backbones.base import block_of, family_of
from camex_ft.upcycling import expert_layers


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        made = values.clone()
        dist.all_reduce(made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # what is made of the sum is the same in every process, and engines average gradients over the processes
        return grad * dist.get_world_size()


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with its gradient; the tensor itself where there is one process.

    The gradient is right for a loss that every process makes of the sum alike, and whose gradients are then averaged
    over the processes, as DDP, FSDP and DeepSpeed do: d loss / d values_p = mean_q of W * d loss_q / d sum.
    """
    if PartialState().num_processes == 1:
        return values
    made: Tensor = _Total.apply(values)
    return made


def largest(value: float) -> float:
    """Return the largest of all processes' values."""
    if PartialState().num_processes == 1:
        return value
    made = torch.tensor(value, dtype=torch.float64, device=PartialState().device)
    dist.all_reduce(made, dist.ReduceOp.MAX)
    return float(made)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, which every process has to ask for; any other tensor as it is."""
    if hasattr(tensor, "ds_id"):  # DeepSpeed's
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def deal(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process has, sharded as `like` is where it has its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def shard_on_cpu(accelerator: Accelerator) -> bool:
    """Let processes on a CPU shard where ``ACCELERATE_USE_FSDP`` asks for it, and return whether they do.

    Accelerate takes that for GPUs alone; what shards is the same.
    """
    wanted = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if not wanted or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does for GPUs
    return True


def compute_in_autocast(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Let a model that is about to be sharded gather its parameters as they are, and leave less precision to autocast.

    Sharding would turn all parameters to bfloat16 before a block runs. A domain vector, the small difference of an
    expert and its base, would be lost in their rounding: 8 bits of the weights' size, not of its own.
    """
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.native_amp or plugin.fsdp_version != 2:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    inner = cast(Any, model.forward)

    @wraps(inner)  # the arguments' names are asked for
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return inner(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward)


def blocks(model: PreTrainedModel) -> list[str]:
    """Return the names of the classes of blocks, each sharded as a unit: those with a feed-forward layer."""
    paths = list(expert_layers(model)) or [ffn.path for ffn in family_of(model).ffns(model)]
    found = [model.get_submodule(block_of(path)) for path in paths]
    return sorted({type(block).__name__ for block in found})


def gather_layers(model: nn.Module) -> None:
    """Let DeepSpeed gather a layer with experts as one: not all of its parts are called as modules."""
    from deepspeed.utils import set_z3_leaf_modules

    kinds = {type(layer) for layer in expert_layers(model).values()}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))


def share_embeddings(model: PreTrainedModel) -> None:
    """Make embeddings that share the input embedding's matrix one module, in place: each is sharded with one alone.

    T5 has one for both of its stacks. A head that shares the matrix stays, since accelerate shards it together.
    """
    shared = model.get_input_embeddings()
    twins = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module is not shared and module.weight is shared.weight
    ]
    for name in twins:
        model.set_submodule(name, shared)


def tied(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a model's gathered state with names that share a parameter sharing a tensor, so that it is saved once.

    It is empty in processes that were given none.
    """
    first: dict[int, str] = {}
    made = dict(state or {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner in made and name in made:
            made[name] = made[owner]
    return made
