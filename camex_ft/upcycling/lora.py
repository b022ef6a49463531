"""LoRA beside the experts, by PEFT: thin trained maps B A next to attention's own, which stay frozen.

    y = x W^T + c (x A^T) B^T            A at random, B = 0: the function is that of the model before

With the protocol `dense`, the baseline, the feed-forward maps get it as well. Which of attention's maps do is PEFT's
choice for the type of backbone, queries and values as in the paper.
Source: LoRA, Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as NAMED
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from camex_ft.backbones import DenseFFN, plain_type
from camex_ft.config.schema import LoraConfig
from camex_ft.utils.errors import UserError, nearest

# of types that PEFT does not name
QUERIES_AND_VALUES = ("q", "v", "q_lin", "v_lin", "query", "value", "q_proj", "v_proj", "c_attn")


def add_lora(model: PreTrainedModel, given: LoraConfig, ffns: Sequence[DenseFFN]) -> None:
    """Give attention LoRA where the settings say so, and the maps of these feed-forward layers; in place.

    Raises:
        UserError: the model has no maps of the names.
    """
    chosen = _attention(model, given) if given.attention else []
    chosen += _within(model, ffns)
    if not chosen:
        return
    one = [isinstance(model.get_submodule(path), Conv1D) for path in chosen]
    settings = PeftConfig(
        r=given.rank,
        lora_alpha=given.scale * given.rank,  # type: ignore[arg-type]  # divided by r again
        lora_dropout=given.dropout,
        target_modules=chosen,
        fan_in_fan_out=all(one),
    )
    inject_adapter_in_model(settings, model)


def _attention(model: PreTrainedModel, given: LoraConfig) -> list[str]:
    """Return the paths of the maps with the names that are wanted."""
    named = given.targets or NAMED.get(plain_type(model.config.model_type)) or QUERIES_AND_VALUES
    linears = list(_linears(model))
    names = sorted({path.rpartition(".")[2] for path in linears})
    unknown = [name for name in given.targets or () if name not in names]
    found = [path for path in linears if path.rpartition(".")[2] in named]
    if unknown or not found:
        wrong = unknown[0] if unknown else ", ".join(named)
        raise UserError(
            f"tuning.lora.targets: {type(model).__name__} has no linear map '{wrong}'.{nearest(wrong, names)} "
            f"It has: {', '.join(names)}"
        )
    return found


def _linears(model: PreTrainedModel) -> Iterable[str]:
    """Yield the paths of the model's linear maps; those of experts are none."""
    return (path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))


def _within(model: PreTrainedModel, ffns: Sequence[DenseFFN]) -> list[str]:
    """Return the paths of the linear maps of dense feed-forward layers."""
    places = [f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence)]
    return [path for path in _linears(model) if f"{path}.".startswith(tuple(places))] if places else []
