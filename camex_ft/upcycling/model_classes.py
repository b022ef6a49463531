"""Classes of upcycled models, made from the plain ones: `CamexBertForSequenceClassification` of type `camex_bert`.

    BertConfig                      -> CamexBertConfig                       model_type camex_bert
    BertForSequenceClassification   -> CamexBertForSequenceClassification    of that configuration class

They are ordinary classes of transformers, registered with its auto classes: `save_pretrained` and `from_pretrained`
work as for any model. Transformers alone refuses the model type, rather than fill layers that it does not know with
random weights. Each class is an attribute of this module, so that it can be imported and pickled by name.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import transformers
from peft.utils import constants as peft_constants
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, TOKENIZER_MAPPING_NAMES

from camex_ft.upcycling import adapters
from camex_ft.upcycling.donor_experts import Donors, fill_from_donors
from camex_ft.upcycling.expert_init import set_experts_apart
from camex_ft.upcycling.freezing import cached, expert_layers, freeze
from camex_ft.upcycling.plan import (
    CAUSAL,
    DONORS,
    KEY,
    LORA,
    NAME,
    Plan,
    plain_kind,
    plan_of,
    plan_of_entry,
    recast,
    stamped,
    written_by,
)
from camex_ft.upcycling.restructuring import restructure
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import unsafe
from camex_ft.utils.registry import PREFIX, PROTOCOLS, families

# what AutoModel and pipelines pass on of themselves, or what changes nothing about a folder
HARMLESS = (
    *("config", "use_safetensors", "trust_remote_code", "adapter_kwargs", "code_revision"),
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
)
_classes: dict[type, type] = {}  # by plain class
_lock = threading.RLock()


class UpcycledConfig:
    """Mixed into the class of a configuration whose models have experts, as its entry ``camex`` says."""

    plain: ClassVar[type[PreTrainedConfig]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the plain class, from which the class is made again."""
        return _by_plain_class(self, super().__reduce_ex__(protocol), config_class)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``, with the format of the entry and the versions that write it."""
        saved = getattr(self, KEY, None)
        if saved is not None:
            setattr(self, KEY, stamped(saved))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class Upcycled:
    """Mixed into the class of a model whose feed-forward layers have experts, as its config's entry ``camex`` says."""

    plain: ClassVar[type[PreTrainedModel]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the plain class, from which the class is made again."""
        return _by_plain_class(self, super().__reduce_ex__(protocol), model_class)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        saved = getattr(config, KEY, None)
        if saved is None:
            raise UserError(
                f"{type(self).__name__}: its configuration has no entry `{KEY}`, which says what experts it has; "
                f"expected one that camex_ft saved. To make a model with experts: camex_ft.upcycle(dense model)"
            )
        plan = plan_of_entry(saved)
        if _was_causal(config) and not type(self).can_generate():  # type: ignore[attr-defined]
            setattr(config, KEY, {**saved, CAUSAL: True})
        dense = recast(config, plain_kind(config))  # some heads make their body by the class: a dense one
        super().__init__(dense, *args, **kwargs)  # type: ignore[call-arg]  # of the plain class
        restructure(cast(PreTrainedModel, self), plan)
        config.__dict__.update(dense.__dict__)  # transformers settles the attention's implementation
        _set_configs(cast(PreTrainedModel, self), config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the saved model, as transformers does; an adapter on the backbone that it names.

        Experts and routers are never drawn at random. Other weights are new only for another head than the saved one,
        and for other sizes with ``ignore_mismatched_sizes=True``.

        Raises:
            UserError: weights are missing, foreign or of other shapes; the entry in the config is newer or unknown; an
                adapter is loaded with arguments for whole checkpoints, or its backbone is missing.
        """
        name = pretrained_model_name_or_path
        adapter = adapters.locate(name, kwargs)
        if adapter is not None:
            return _adapter_of_class(cls, adapter, kwargs)
        asked, resized = (
            kwargs.pop("output_loading_info", False),
            kwargs.get("ignore_mismatched_sizes", False),
        )
        settings = {"use_safetensors": True, **kwargs}  # a pickle is never read
        settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(name, *args, **settings)  # type: ignore[misc]
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        check_weights(name, wrong_weights(model, info, resized=resized), getattr(model.config, KEY, None))
        return (model, info) if asked else model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; the parameters are taken to stay as they are meanwhile."""
        with cached(cast(PreTrainedModel, self)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


# -- the classes and their registration


def config_class(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the upcycled configuration class of a plain one, made and registered at the first call."""
    if issubclass(plain, UpcycledConfig):
        return plain
    with _lock:
        if plain not in _classes:
            members = {"plain": plain, "model_type": PREFIX + plain.model_type, "__module__": __name__}
            upcycled = cast(
                type[PreTrainedConfig], type(NAME + plain.__name__, (UpcycledConfig, plain), members)
            )
            _classes[plain] = upcycled
            AutoConfig.register(upcycled.model_type, upcycled, exist_ok=True)
            _register_models(plain, upcycled)
        return _classes[plain]


def model_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of upcycled models of a plain class."""
    if issubclass(plain, Upcycled):
        return plain
    with _lock:
        if plain not in _classes:
            members: dict[str, Any] = {"plain": plain, "__module__": __name__, "__doc__": Upcycled.__doc__}
            config = plain.config_class
            if isinstance(config, type) and issubclass(config, PreTrainedConfig):
                members["config_class"] = config_class(config)
        if plain not in _classes:  # the configuration's models are made with it
            _classes[plain] = type(NAME + plain.__name__, (Upcycled, plain), members)
        return _classes[plain]


def register_families() -> None:
    """Register the upcycled models of every backbone family, those of plug-ins among them, with the auto classes.

    A type that transformers does not know is registered when a model of it is upcycled.

    Raises:
        UserError: a plug-in cannot be imported.
    """
    for model_type in families():
        if model_type in CONFIG_MAPPING:
            config_class(CONFIG_MAPPING[model_type])


def _register_models(plain: type[PreTrainedConfig], upcycled: type[PreTrainedConfig]) -> None:
    """Tell the auto classes the models and the tokenizer of a configuration class, and PEFT its attention."""
    for auto in {id(kind): kind for kind in vars(modeling_auto).values() if _is_auto(kind)}.values():
        mapping = auto._model_mapping
        if plain not in mapping:
            continue
        models = mapping[plain]
        first: type[PreTrainedModel] = models[0] if isinstance(models, tuple) else models
        if first.config_class is not plain:  # a model that has this one inside
            continue
        auto.register(upcycled, model_class(first), exist_ok=True)
        # the Trainer and pipelines know a model's purpose by the name of its class
        mapping._model_mapping.setdefault(upcycled.model_type, NAME + first.__name__)
    TOKENIZER_MAPPING_NAMES.setdefault(upcycled.model_type, TOKENIZER_MAPPING_NAMES.get(plain.model_type))
    tokenizer = TOKENIZER_MAPPING.get(plain, None)
    if tokenizer is not None:
        AutoTokenizer.register(upcycled, tokenizer, exist_ok=True)
    for name, targets in vars(peft_constants).items():  # what PEFT adapts where it is not told
        if name.endswith("TARGET_MODULES_MAPPING") and plain.model_type in targets:
            targets.setdefault(upcycled.model_type, targets[plain.model_type])


def _is_auto(kind: Any) -> bool:
    return isinstance(kind, type) and getattr(kind, "_model_mapping", None) is not None


def plain_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the plain class of a class of models, upcycled or not."""
    return kind.plain if issubclass(kind, Upcycled) else kind


def class_named(name: str) -> type[PreTrainedModel] | None:
    """Return the class of models that ``architectures`` names, plain or upcycled; None for an unknown name."""
    with _lock:  # also of classes that are not transformers'
        own = [kind for kind in _classes.values() if kind.__name__ == name]
    kind_named = own[0] if own else getattr(transformers, name.removeprefix(NAME), None)
    if not isinstance(kind_named, type) or not issubclass(kind_named, PreTrainedModel):
        return None
    return model_class(kind_named) if name.startswith(NAME) else kind_named


def __getattr__(name: str) -> Any:
    """Make a class when it is first asked for by name, by an import or from a pickle."""
    plain = getattr(transformers, name.removeprefix(NAME), None) if name.startswith(NAME) else None
    if isinstance(plain, type) and issubclass(plain, PreTrainedConfig):
        return config_class(plain)
    kind = class_named(name) if name.startswith(NAME) else None
    if kind is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return kind


def _by_plain_class(instance: Any, reduced: Any, kind: Callable[[Any], type]) -> tuple[Any, ...]:
    """Reduce an object for pickling to the plain class from which `kind` makes its class."""
    plain = instance.plain
    if _classes.get(plain) is not type(instance):
        return tuple(reduced)
    return _blank, (kind, plain), *reduced[2:]


def _blank(kind: Callable[[Any], type], plain: type) -> Any:
    """Return an object of the class that `kind` makes of a plain one, without any state."""
    return object.__new__(kind(plain))


# -- models of the classes


def build(model: PreTrainedModel, plan: Plan, seed: int, donors: Donors | None = None) -> PreTrainedModel:
    """Return a dense model, restructured in place as the plan says, under its upcycled class.

    A model that the plan leaves dense is returned as it is.

    Args:
        model: the dense model.
        plan: of the upcycling.
        seed: of new parameters.
        donors: the donors of its experts; None for a saved model, whose weights are loaded afterwards.
    """
    lora = plan.tuning.mode == LORA
    if PROTOCOLS.get(plan.merging.protocol).form == "dense" and not lora:
        return model
    dtype = model.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        restructure(model, plan)
        set_experts_apart(list(expert_layers(model).values()), plan.upcycle)
    saved: dict[str, Any] = plan.sections()
    if donors:
        fill_from_donors(expert_layers(model), donors)
        saved["upcycle"] = donors.section(saved["upcycle"])
        saved[DONORS] = donors.described()
    if lora:
        freeze(model, LORA)
        if not donors:  # else the backbone has changed, and the model is saved whole
            saved[adapters.BACKBONE] = adapters.source_of(model, seed=seed, dtype=dtype)
    setattr(model.config, KEY, saved)
    return _as_upcycled(model)


def _as_upcycled(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the upcycled class with the modules and everything else of a restructured model."""
    kind = model_class(type(model))
    config = recast(model.config, config_class(plain_kind(model.config)))
    upcycled: Any = object.__new__(kind)
    # transformers notes each class that is constructed, so that hidden states and attentions can be recorded
    PreTrainedModel.__init__(upcycled, copy.deepcopy(config))
    upcycled.__dict__.update(model.__dict__)
    # of a checkpoint's names of experts to those of the plain class; an upcycled model is saved under its own
    upcycled.__dict__.pop("_weight_conversions", None)
    _set_configs(upcycled, config)
    return upcycled


def _set_configs(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give a model with plain configurations `config`, and to each further one in its modules an upcycled one."""
    plain, upcycled = plain_kind(config), {id(model.config): config}
    module: Any
    for module in list(model.modules()):
        own = getattr(module, "config", None)
        if type(own) is plain:  # a stack of T5 has a copy of its own, which its modules share
            module.config = upcycled.setdefault(id(own), recast(own, type(config)))


def _was_causal(config: PreTrainedConfig) -> bool:
    """Return whether the upcycled model that was saved with a configuration was a language model that generates."""
    kind = class_named(str((config.architectures or [""])[0]))
    return kind is not None and issubclass(kind, Upcycled) and bool(cast(Any, kind).can_generate())


def wrong_weights(
    model: PreTrainedModel, info: Mapping[str, Any], *, resized: bool = False
) -> dict[str, str]:
    """Return the names of weights that were not loaded as saved, each with its fault.

    Differences between the saved head and another one are no fault, nor are other sizes if they are `resized`. Experts
    and routers must be there in any case.
    """
    missing, foreign = set(info["missing_keys"]), set(info["unexpected_keys"])
    shaped = {key[0] for key in info["mismatched_keys"]}
    layers = tuple(f"{path}." for path in expert_layers(model))
    saved = _saved_class(model.config)
    if saved is not None and saved is not type(model) and missing | foreign:
        with torch.device("meta"):
            names: Sequence[str] = list(saved(copy.deepcopy(model.config)).state_dict())
        start = f"{model.base_model_prefix}."
        known = {name.removeprefix(start) for name in names}
        missing = {n for n in missing if n.startswith(layers) or n.removeprefix(start) in known}
        foreign = {n for n in foreign if n.removeprefix(start) not in known}
    if resized:
        shaped = {name for name in shaped if name.startswith(layers)}
    return {
        **dict.fromkeys(foreign, "is of another model"),
        **dict.fromkeys(shaped, "has another shape"),
        **dict.fromkeys(missing, "is missing"),
    }


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of upcycled models that a configuration was saved with; None if it names none."""
    named = class_named(str((config.architectures or [""])[0]))
    kind = None if named is None else model_class(named)
    return kind if kind is not None and kind.config_class is type(config) else None


def check_weights(name: Any, wrong: Mapping[str, str], saved: Any = None) -> None:
    """Raise `UserError` for wrong weights (`wrong_weights`), with the versions that wrote them."""
    if not wrong:
        return
    first = min(wrong)
    by = f" (it was {written_by(saved)})" if saved is not None else ""
    heads = "has another shape" in wrong.values()
    raise UserError(
        f"{name}: the checkpoint is incomplete or of another model: {len(wrong)} weights do not match, such as "
        f"{first}, which {wrong[first]}{by}. Expected weights and config.json of one model: copy the folder again"
        + (
            ". Where other sizes are meant, as of a new head: from_pretrained(..., ignore_mismatched_sizes=True)"
            if heads
            else ""
        )
    )


def with_adapter(folder: Path, backbone: PreTrainedModel | str | None) -> PreTrainedModel:
    """Return an adapter's model: its backbone, restructured, with the trained parameters."""
    about = adapters.read(folder)
    dense: Any = copy.deepcopy(backbone) if isinstance(backbone, PreTrainedModel) else about.dense(backbone)
    dense = dense if dense.dtype == about.dtype else dense.to(about.dtype)
    model = build(dense, plan_of(about.plan), seed=about.seed)
    about.check(model)
    adapters.restore(model, folder)
    return model.eval()


def _adapter_of_class(kind: type, folder: Path, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Return an adapter's model for `from_pretrained` of its class.

    Raises:
        UserError: an argument is for whole checkpoints, or the model is of another class.
    """
    why = unsafe(folder)
    if why:
        raise UserError(f"{folder}: {why}")
    passed = {n: value for n, value in arguments.items() if value is not None and not n.startswith("_")}
    asked = [n for n, value in passed.items() if n not in HARMLESS and (n, value) != ("dtype", "auto")]
    if asked:
        raise UserError(
            f"{folder} is an adapter, and {asked[0]} is for whole checkpoints: expected camex_ft.load(folder), then "
            "the change to the model"
        )
    model = with_adapter(folder, None)
    if type(model) is not kind:
        raise UserError(
            f"{folder} is an adapter of a {type(model).__name__}, not of a {kind.__name__}: expected that class, or "
            "camex_ft.load(folder)"
        )
    return model
