"""Backbone families: the description that each gives the upcycler, and the family of a model.

    model --family_of--> Family --ffns--> [DenseFFN, ...] --select_layers--> the ones that become experts
                                          [SparseFFN, ...] of a mixture, whose dense layers stay dense
                         Family --masks--> {"encoder": [B, L], "decoder": [B, L]} at every forward pass

A family is one file in this package: a function that lists the feed-forward layers, under `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from camex_ft.utils import registry
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import families, plain_type, refused_type

if TYPE_CHECKING:  # so that listing the families needs no torch
    from torch import Tensor, nn

    Masks = dict[str, Tensor | None]
    FindFFNs = Callable[[nn.Module], Sequence["DenseFFN"]]
    MakeMasks = Callable[[nn.Module, Mapping[str, Any]], Masks]
    CountPositions = Callable[[Any], int | None]
    ReadRouting = Callable[[Any], "MixtureRouting"]

Stack = Literal["encoder", "decoder"]


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """One dense feed-forward layer of a backbone, described well enough to stand in for it.

    With d the hidden and f the inner size, the layer computes, on hidden states x [B, L, d],

        inner = activation(x gate^T + b_gate) * (x up^T + b_up)     where there is a gate,
        inner = activation(x up^T + b_up)                           where there is none,
        y     = outer_dropout(inner_dropout(inner) down^T + b_down)       [B, L, d]

    and the module that replaces `path` returns y, once the modules in `silence` are identities.

    Attributes:
        path: dotted name of the module to replace.
        stack: "encoder" where attention is bidirectional, "decoder" where it is causal.
        layer: position in its stack, from 0.
        weights: "up" [f, d], "down" [d, f] and, if gated, "gate" [f, d], each with its bias [out] or None.
            Detached views of the model's own parameters, always as [out, in].
        activation: the layer's own function or module: `copy.deepcopy` it.
        inner_dropout: probability after the activation.
        outer_dropout: probability after `down`.
        silence: dotted names of modules that become `nn.Identity`, because the replacement does their work.
    """

    path: str
    stack: Stack
    layer: int
    weights: Mapping[str, tuple[Tensor, Tensor | None]]
    activation: Callable[[Tensor], Tensor]
    inner_dropout: float = 0.0
    outer_dropout: float = 0.0
    silence: tuple[str, ...] = ()

    @property
    def experts_of_token(self) -> int:
        """Number of experts that compute a token's output."""
        return 1

    @property
    def numbers(self) -> int:
        """Number of entries of all weight matrices."""
        return sum(weight.numel() for weight, _ in self.weights.values())

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    @property
    def hidden_size(self) -> int:
        return self.weights["up"][0].shape[1]

    @property
    def inner_size(self) -> int:
        return self.weights["up"][0].shape[0]


class MixtureRouting(NamedTuple):
    """Routing of a sparse mixture, as its configuration says it.

    Attributes:
        experts, top_k: N and k.
        normalise: softmax "after" the k largest logits were chosen, over them, or "before", over all.
        scale: factor on the mixed outputs.
    """

    experts: int
    top_k: int
    normalise: Literal["after", "before"]
    scale: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseFFN(DenseFFN):
    """The routed experts of one sparse mixture of a backbone, in place of a dense feed-forward layer.

    With the layer of `DenseFFN` as each expert's, it computes for every token x_t

        y_t = scale * sum_i s_ti expert_i(x_t)      s_t = softmax(x_t router^T), 0 but for the k largest

    and with `shared` modules beside it the block computes y + shared(x), or y + sigmoid(x g^T) shared(x).

    Attributes:
        path: of the block; where it has shared experts, of its module of routed experts.
        layer: position among the mixtures of its stack, from 0.
        weights: those of the first expert.
        experts: "up" [N, f, d], "gate" [N, f, d] and "down" [N, d, f] of all experts; views, as `weights`.
        router: logits are x router^T; [N, d].
        routing: N, k, and how the routing weights are normalised.
        shared: names of the block's shared expert and of its gate g, if any; empty: it has none.
    """

    experts: Mapping[str, Tensor]
    router: Tensor
    routing: MixtureRouting
    shared: tuple[str, ...] = ()

    @property
    def experts_of_token(self) -> int:
        return self.routing.top_k

    @property
    def numbers(self) -> int:
        return sum(matrices.numel() for matrices in self.experts.values())

    @property
    def block(self) -> str:
        """Dotted name of the block around the routed experts."""
        return self.path.rpartition(".")[0] if self.shared else self.path


@dataclass(frozen=True)
class Family:
    """A backbone family: models of one layout, whatever their head.

    Attributes:
        name: the file's name, as `camex-ft ls backbones` lists it.
        model_types: values of `config.model_type` that it serves.
        summary: first line of the family's docstring.
        ffns: lists a model's dense feed-forward layers, encoder first, each stack from first to last layer.
        masks: from the model and its forward pass's keyword arguments, the mask [B, L] of each stack's
            positions (zero: padding) or None where all are real. With a key-value cache L counts the cached
            positions too. `ValueError` for a mask of another shape.
        positions: the most tokens that a model reads, from its transformers configuration; None: no limit.
        attention: last names of the linear maps of attention that get LoRA, queries and values as in the paper; empty:
            those that PEFT names for the type.
        routing: of a family of sparse mixtures, from the configuration (`MixtureRouting`); None: its layers are dense.
        refused: types of the same architecture that are not served, each with the reason.
    """

    name: str
    model_types: tuple[str, ...]
    summary: str
    ffns: FindFFNs
    masks: MakeMasks
    positions: CountPositions
    attention: tuple[str, ...]
    routing: ReadRouting | None = None
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name: functions come from the registry of the process that unpickles."""
        return _registered, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        """Return the family itself, which nothing changes."""
        return self


def all_positions(config: Any) -> int | None:
    """Return the size of the table of positions, or what rotary positions were trained up to."""
    return getattr(config, "max_position_embeddings", None)


def register(
    name: str,
    *,
    model_types: Sequence[str],
    masks: MakeMasks,
    positions: CountPositions = all_positions,
    attention: Sequence[str] = (),
    routing: ReadRouting | None = None,
    refused: Mapping[str, str] | None = None,
) -> Callable[[FindFFNs], FindFFNs]:
    """Decorate the function that lists a family's feed-forward layers, and register the family `name`."""

    def add(ffns: FindFFNs) -> FindFFNs:
        summary = (ffns.__doc__ or name).strip().splitlines()[0]
        family = Family(
            name,
            tuple(model_types),
            summary,
            ffns,
            masks,
            positions,
            tuple(attention),
            routing,
            refused or {},
        )
        registry.BACKBONES.add(name, family)
        return ffns

    return add


def _registered(name: str) -> Family:
    """Return a registered family."""
    family: Family = registry.BACKBONES.get(name)
    return family


def family_for(model_type: str) -> Family:
    """Return the family that serves `config.model_type`, of a dense or an upcycled model.

    Raises:
        UserError: no family serves it; names the known types and the file to add.
    """
    known = families()
    model_type = plain_type(model_type)
    if model_type not in known:
        why = refused_type(model_type)
        if why:
            raise UserError(why)
        module = str(model_type).replace("-", "_")
        raise UserError(
            f"unknown backbone type '{model_type}'.{nearest(model_type, known)} "
            f"Known types: {', '.join(sorted(known))}. "
            f"To add it, write one file, camex_ft/backbones/families/{module}.py, that lists its feed-forward layers "
            f"(or put that file in a folder named by {registry.PLUGINS})."
        )
    family: Family = known[model_type]
    return family


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformers model, found by its `config.model_type`.

    Raises:
        UserError: the model has no such configuration, or no family serves its type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not model_type:
        raise UserError(f"{type(model).__name__} is not a transformers model: it has no config.model_type")
    return family_for(model_type)


def generates(model: nn.Module) -> bool:
    """Return whether the model has a language-modelling head that can generate.

    True of `*ForCausalLM`, `*ForConditionalGeneration` and `*LMHeadModel`; false of heads for classification,
    question answering or masked modelling, and of a model without a head.
    """
    return bool(getattr(type(model), "can_generate", lambda: False)())


def block_of(path: str) -> str:
    """Return the block that a module is in: its path up to the first number; "" outside of all blocks."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def select_layers(ffns: Sequence[DenseFFN], layers: str | Sequence[int]) -> list[DenseFFN]:
    """Return the feed-forward layers that `upcycle.layers` asks for, in the order of `ffns`.

    Args:
        ffns: all of them, as `Family.ffns` lists them.
        layers: "all"; "every_other": in each stack every second layer, the last one among them (1, 3, 5, ...
            of an even number, as in Switch Transformers); or a list of positions in `ffns`, so that with two
            stacks of n layers the encoder's are 0 .. n-1 and the decoder's n .. 2n-1.

    Raises:
        UserError: another word, an empty list, a position that does not exist or that comes twice.
    """
    if layers == "all":
        return list(ffns)
    if layers == "every_other":
        depth = {stack: sum(f.stack == stack for f in ffns) for stack in ("encoder", "decoder")}
        return [f for f in ffns if (depth[f.stack] - 1 - f.layer) % 2 == 0]
    if isinstance(layers, str):
        raise UserError(
            f"upcycle.layers: '{layers}' is neither all, every_other nor a list."
            + nearest(layers, ("all", "every_other"))
        )
    if not layers:
        raise UserError(
            "upcycle.layers: the list is empty, so no layer would get experts; say all, every_other or positions"
        )
    wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(ffns)]
    if wrong:
        stacks = [f"{s} {min(p)} to {max(p)}" for s in ("encoder", "decoder") if (p := _positions(ffns, s))]
        raise UserError(
            f"upcycle.layers: no layer {', '.join(map(str, wrong))}; "
            f"this backbone's layers are 0 to {len(ffns) - 1} ({', '.join(stacks)})"
        )
    if len(set(layers)) < len(layers):
        raise UserError(f"upcycle.layers: {list(layers)} names a layer twice")
    return [ffns[i] for i in sorted(layers)]


def _positions(ffns: Sequence[DenseFFN], stack: str) -> list[int]:
    return [i for i, f in enumerate(ffns) if f.stack == stack]
