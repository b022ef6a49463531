"""Helpers that several families share: finding modules, reading their weights, layouts, masks of one-stack models.

Modules are found by the names of their children, not by path or class: every head and subclass is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import DenseFFN, MixtureRouting, SparseFFN, Stack
from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from camex_ft.backbones.base import Masks


def find(model: nn.Module, *children: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, module) of every module that has all the dotted `children`, as registered."""
    for path, module in model.named_modules():
        if all(_has(module, child) for child in children):
            yield path, module


def _has(module: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return an `nn.Linear`'s weight [out, in] and bias [out] or None, as detached views."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def conv1d(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, in] and bias [out] of transformers' `Conv1D`, which stores [in, out]."""
    return module.weight.detach().t(), module.bias.detach()


def two_dimensional(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    """Return the mask `inputs[name]` [B, L] or None; `ValueError` if it has another number of dimensions.

    Heads for multiple choice flatten their inputs [B, C, L] to [B * C, L], and so their mask.
    """
    mask = inputs.get(name)
    if getattr(mask, "ndim", 0) == 3 and getattr(inputs.get("input_ids"), "ndim", 0) == 3:
        mask = mask.flatten(0, 1)  # type: ignore[union-attr]  # [B * C, L]
    if mask is not None and getattr(mask, "ndim", None) != 2:
        shown = f"shape {list(mask.shape)}" if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"{name}: routing needs the padding mask [batch, length] (1 real, 0 padding), "
            f"not a ready-made attention mask ({shown})"
        )
    return mask


def causal_stack(model: nn.Module) -> Stack:
    """The stack of a decoder-only model: "decoder", unless `config.is_causal` is false."""
    return "decoder" if getattr(model.config, "is_causal", True) else "encoder"


def encoder_stack(model: nn.Module) -> Stack:
    """The stack of a BERT-like model: "encoder", unless `config.is_decoder` is true."""
    return "decoder" if getattr(model.config, "is_decoder", False) else "encoder"


def one_stack(stack: Callable[[nn.Module], Stack]) -> Callable[[nn.Module, Mapping[str, Any]], Masks]:
    """Return the `masks` of a family with one stack: the attention mask, under the stack's name."""

    def masks(model: nn.Module, inputs: Mapping[str, Any]) -> Masks:
        return {stack(model): two_dimensional(inputs, "attention_mask")}

    return masks


def refuse_chunking(model: nn.Module) -> None:
    """Raise `UserError` if the model feeds its FFNs in chunks: a router would see only a part of the sequence."""
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)
    if chunk:
        raise UserError(
            f"the backbone's config has chunk_size_feed_forward: {chunk}, "
            "but routing needs whole sequences: set it to 0 in its config.json"
        )


def bert_ffns(model: nn.Module) -> list[DenseFFN]:
    """List the FFNs of BERT's layout: the block calls `intermediate(h)`, then `output(that, h)`.

    The expert FFN replaces `intermediate` and does the work of `output.dense` as well, which becomes the
    identity; dropout, residual and normalisation stay in `output`.
    """
    refuse_chunking(model)
    blocks = find(model, "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
    return [
        DenseFFN(
            path=f"{path}.intermediate",
            stack=encoder_stack(model),
            layer=layer,
            weights={"up": linear(block.intermediate.dense), "down": linear(block.output.dense)},
            activation=block.intermediate.intermediate_act_fn,
            silence=(f"{path}.output.dense",),
        )
        for layer, (path, block) in enumerate(blocks)
    ]


def gated_mlp_ffns(model: nn.Module) -> list[DenseFFN]:
    """List the FFNs of Llama's layout: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, no dropout."""
    return [
        DenseFFN(
            path=path,
            stack=causal_stack(model),
            layer=layer,
            weights={"up": linear(mlp.up_proj), "down": linear(mlp.down_proj), "gate": linear(mlp.gate_proj)},
            activation=mlp.act_fn,
        )
        for layer, (path, mlp) in enumerate(find(model, "gate_proj", "up_proj", "down_proj", "act_fn"))
    ]


def number(config: Any, *names: str, default: int) -> int:
    """Return the first of these values that a configuration has: names differ between versions of transformers."""
    values = (getattr(config, name, None) for name in names)
    return int(next((value for value in values if value is not None), default))


def mixture_ffns(model: nn.Module, routing: MixtureRouting, *, shared: Sequence[str] = ()) -> list[SparseFFN]:
    """List the mixtures of transformers' layout: a router `gate`, and `experts` with fused matrices without biases.

        gate_up_proj [N, 2 f, d]: gate, then up        down_proj [N, d, f]

    Args:
        model: of a family of sparse mixtures.
        routing: of its mixtures.
        shared: names of a block's shared expert and of its gate, if any.
    """
    ffns = []
    children = ("gate.weight", "experts.gate_up_proj", "experts.down_proj", "experts.act_fn", *shared)
    for layer, (path, block) in enumerate(find(model, *children)):
        gate, up = block.experts.gate_up_proj.detach().chunk(2, dim=1)  # [N, f, d]
        experts = {"up": up, "gate": gate, "down": block.experts.down_proj.detach()}
        ffns.append(
            SparseFFN(
                path=f"{path}.experts" if shared else path,
                stack=causal_stack(model),
                layer=layer,
                weights={name: (matrices[0], None) for name, matrices in experts.items()},
                activation=block.experts.act_fn,
                silence=(f"{path}.gate",) if shared else (),
                experts=experts,
                router=block.gate.weight.detach(),
                routing=routing,
                shared=tuple(shared),
            )
        )
    return ffns
