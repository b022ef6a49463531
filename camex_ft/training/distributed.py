"""Several processes: sums over the global batch, engines that shard parameters, and gathering what they shard.

A checkpoint holds model and optimizer as one process has them: sharded tensors are gathered when it is saved and dealt
out again when it is loaded. DeepSpeed has its own form.

Randomness: parameters are drawn from the seed before anything is sharded, alike in every process. In training, process
r draws dropout and routing noise from seed + r, since its rows differ. Masks of parameters, as those of `dare`, follow
from the seed and the number of the forward pass (`RoutingContext.seeded`), alike in every process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32, reduce, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from camex_ft.backbones.base import block_of, family_of
from camex_ft.upcycling import expert_layers, keep_nothing
from camex_ft.utils.errors import UserError

# -- sums -------------------------------------------------------------------------------------------------------------


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        result = values.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every process computes the same from the sum, and engines average gradients over the processes
        return grad * dist.get_world_size()


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with its gradient; with one process, the tensor itself.

    The gradient is right for a loss that every process computes alike from the sum and whose gradients are averaged
    over the processes, as DDP, FSDP and DeepSpeed do: d loss / d values_p = mean_q of W * d loss_q / d sum.
    """
    if PartialState().num_processes == 1:
        return values
    return cast(Tensor, _Total.apply(values))


def count_over_processes(count: Tensor | int) -> int:
    """Return the sum of every process's count."""
    state = PartialState()
    return int(
        count if state.num_processes == 1 else reduce(torch.as_tensor(count, device=state.device), "sum")
    )


def largest(value: float) -> float:
    """Return the largest of all processes' values."""
    if PartialState().num_processes == 1:
        return value
    result = torch.tensor(value, dtype=torch.float64, device=PartialState().device)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return float(result)


# -- sharded tensors --------------------------------------------------------------------------------------------------


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
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def gathered(state: dict[str, Any], *, writes: bool) -> dict[str, Any]:
    """Return an optimizer's state with its sharded tensors in full, in the process that writes; others take part."""
    whole_state: dict[str, Any] = tree_map_only(
        Tensor, lambda tensor: whole(tensor).cpu() if writes else whole(tensor).new_empty(0), state
    )  # one tensor at a time
    return whole_state


def dealt(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return this process's part of an optimizer's state, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        i: {key: deal(value, parameters[i]) for key, value in entries.items()}
        for i, entries in state["state"].items()
    }
    return {**state, "state": own}


def tied(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a model's gathered state with names that share a parameter sharing a tensor, so that it is saved once.

    It is empty in processes without a state.
    """
    first: dict[int, str] = {}
    shared = dict(state or {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner in shared and name in shared:
            shared[name] = shared[owner]
    return shared


# -- engines ----------------------------------------------------------------------------------------------------------


def prepare_model(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Prepare a model for the engine that will shard it block by block; in place, before it is wrapped."""
    if accelerator.distributed_type == DistributedType.FSDP:
        share_embeddings(model)
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or blocks(model)
        compute_in_autocast(model, accelerator)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_precision(model, accelerator.mixed_precision)
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            # a layer with experts is gathered as one: not all of its parts are called as modules
            if kinds := {type(layer) for layer in expert_layers(model).values()}:
                set_z3_leaf_modules(model, list(kinds))
    else:
        return
    keep_nothing(model)


def check_precision(model: PreTrainedModel, mixed_precision: str) -> None:
    """Raise `UserError` where DeepSpeed would hold experts in half precision and lose their differences."""
    layers = expert_layers(model).values()
    differences = any(layer.settings.base and layer.low_rank is None for layer in layers)
    if differences and mixed_precision != "no":
        raise UserError(
            f"training.{mixed_precision}: DeepSpeed would hold experts and base expert in half precision, in whose "
            "rounding their difference, the domain vector, is lost; expected --engine ddp or fsdp, which leave that "
            "to autocast, or float32"
        )


def shard_on_cpu(accelerator: Accelerator) -> bool:
    """Make processes on a CPU shard where ``ACCELERATE_USE_FSDP`` asks for it, and return whether they do.

    Accelerate shards on GPUs alone; torch does it on a CPU in the same way.
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
    """Make a model gather its sharded parameters in full precision, and leave half precision to autocast.

    Sharding would turn all parameters to bfloat16 before a block runs. A domain vector, the small difference of an
    expert and its base, would be lost in their rounding: 8 bits of the weights' size, not of its own.
    """
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.native_amp or plugin.fsdp_version != 2:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    inner = cast(Any, model.forward)

    @wraps(inner)  # callers read the arguments' names
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return inner(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward)


def blocks(model: PreTrainedModel) -> list[str]:
    """Return the names of the classes of blocks, each sharded as a unit: those with a feed-forward layer."""
    paths = list(expert_layers(model)) or [ffn.path for ffn in family_of(model).ffns(model)]
    return sorted({type(model.get_submodule(block_of(path))).__name__ for path in paths})


def share_embeddings(model: PreTrainedModel) -> None:
    """Replace embeddings that share the input embedding's matrix by that embedding: a parameter is sharded once.

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
