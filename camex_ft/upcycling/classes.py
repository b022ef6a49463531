"""Classes of upcycled models, made from the plain ones: `CamexBertForSequenceClassification` of type `camex_bert`.

    BertConfig                      -> CamexBertConfig                       model_type camex_bert
    BertForSequenceClassification   -> CamexBertForSequenceClassification    of that configuration class

They are ordinary classes of transformers: `save_pretrained`, `from_pretrained` and the auto classes know them once
camex_ft is imported (`camex_ft.hf`). Transformers alone refuses the model type, rather than fill layers that
it does not know with random weights. Each class is an attribute of this module, made when it is first asked for, so
that it can be imported and pickled by name.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, ClassVar, cast

import transformers
from peft.utils import constants as peft_constants
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, TOKENIZER_MAPPING_NAMES

from camex_ft.upcycling import entry
from camex_ft.upcycling.granularities import CAUSAL
from camex_ft.upcycling.layers import cached
from camex_ft.upcycling.restructuring import restructure
from camex_ft.utils.architectures import PREFIX
from camex_ft.utils.errors import UserError

NAME = "Camex"
_made: dict[type, type] = {}  # of plain classes
_lock = threading.RLock()


class UpcycledConfig:
    """Mixed into the class of a configuration whose models have experts, as its entry ``camex`` says."""

    plain: ClassVar[type[PreTrainedConfig]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the plain class, from which the class is made again."""
        return _by_plain_class(self, super().__reduce_ex__(protocol), config_class)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``, with the format of the entry and the versions that write it."""
        saved = getattr(self, entry.KEY, None)
        if saved is not None:
            setattr(self, entry.KEY, entry.stamped(saved))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class Upcycled:
    """Mixed into the class of a model whose feed-forward layers have experts, as its config's entry ``camex`` says."""

    plain: ClassVar[type[PreTrainedModel]]
    # `loading.read_as`, which sets it: reading a saved model needs the classes that are made here
    reader: ClassVar[Callable[..., Any]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the plain class, from which the class is made again."""
        return _by_plain_class(self, super().__reduce_ex__(protocol), model_class)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        saved = getattr(config, entry.KEY, None)
        if saved is None:
            raise UserError(
                f"{type(self).__name__}: its configuration has no entry `{entry.KEY}`, which says what experts it has; "
                f"expected one that camex_ft saved. To make a model with experts: camex_ft.upcycle(dense model)"
            )
        plan, plain = entry.plan(saved), _plain_kind(config)
        if _was_causal(config) and not type(self).can_generate():  # type: ignore[attr-defined]
            setattr(config, entry.KEY, {**saved, CAUSAL: True})
        config.__class__ = plain  # some heads make their body by its configuration's class: a dense one
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the plain class
        finally:
            config.__class__ = config_class(plain)
        made = cast(PreTrainedModel, self)
        restructure(made, plan)
        _adopt_configs(made)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the saved model, as transformers does; of an adapter, on the backbone that it names.

        No expert and no router is ever drawn at random. Elsewhere weights are new only where they were meant to be: of
        another head than the one that was saved, and of other sizes with ``ignore_mismatched_sizes=True``.

        Raises:
            UserError: weights are missing, foreign or of other shapes; the entry in the config is of a newer version,
                or unknown; an adapter is to be loaded otherwise than `camex_ft.load` does, or its backbone is gone.
        """
        read = super().from_pretrained  # type: ignore[misc]
        return cls.reader(cls, read, pretrained_model_name_or_path, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; the parameters are taken to stay as they are meanwhile."""
        with cached(cast(PreTrainedModel, self)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def config_class(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the configuration class of upcycled models of a plain one's; the auto classes know it from then on."""
    if issubclass(plain, UpcycledConfig):
        return plain
    with _lock:
        if plain not in _made:
            members = {"plain": plain, "model_type": PREFIX + plain.model_type, "__module__": __name__}
            made = cast(type[PreTrainedConfig], type(NAME + plain.__name__, (UpcycledConfig, plain), members))
            _made[plain] = made
            AutoConfig.register(made.model_type, made, exist_ok=True)
            _register_models(plain, made)
        return _made[plain]


def model_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of upcycled models of a plain class."""
    if issubclass(plain, Upcycled):
        return plain
    with _lock:
        if plain not in _made:
            members: dict[str, Any] = {"plain": plain, "__module__": __name__, "__doc__": Upcycled.__doc__}
            config = plain.config_class
            if isinstance(config, type) and issubclass(config, PreTrainedConfig):
                members["config_class"] = config_class(config)
        if plain not in _made:  # the configuration's models are made with it
            _made[plain] = type(NAME + plain.__name__, (Upcycled, plain), members)
        return _made[plain]


def _by_plain_class(made: Any, reduced: Any, kind: Callable[[Any], type]) -> tuple[Any, ...]:
    """Return how to pickle an object whose class `kind` makes of a plain one; a subclass is pickled by its name."""
    plain = made.plain
    if _made.get(plain) is not type(made):
        return tuple(reduced)
    return _blank, (kind, plain), *reduced[2:]


def _blank(kind: Callable[[Any], type], plain: type) -> Any:
    """Return an object of the class that `kind` makes of a plain one, without any state."""
    return object.__new__(kind(plain))


def _register_models(plain: type[PreTrainedConfig], made: type[PreTrainedConfig]) -> None:
    """Tell the auto classes the models and the tokenizer of a configuration class, and PEFT its attention."""
    for auto in {id(kind): kind for kind in vars(modeling_auto).values() if _is_auto(kind)}.values():
        mapping = auto._model_mapping
        if plain not in mapping:
            continue
        found = mapping[plain]
        first: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        if first.config_class is not plain:  # a model that has this one inside
            continue
        auto.register(made, model_class(first), exist_ok=True)
        # the Trainer and pipelines know a model's purpose by the name of its class
        mapping._model_mapping.setdefault(made.model_type, NAME + first.__name__)
    TOKENIZER_MAPPING_NAMES.setdefault(made.model_type, TOKENIZER_MAPPING_NAMES.get(plain.model_type))
    tokenizer = TOKENIZER_MAPPING.get(plain, None)
    if tokenizer is not None:
        AutoTokenizer.register(made, tokenizer, exist_ok=True)
    for name, targets in vars(peft_constants).items():  # what PEFT adapts where it is not told
        if name.endswith("TARGET_MODULES_MAPPING") and plain.model_type in targets:
            targets.setdefault(made.model_type, targets[plain.model_type])


def _is_auto(kind: Any) -> bool:
    return isinstance(kind, type) and getattr(kind, "_model_mapping", None) is not None


def adopt(model: PreTrainedModel) -> None:
    """Give a model that was restructured the class of upcycled models, and its configurations theirs, in place."""
    _adopt_configs(model)
    model.__class__ = model_class(type(model))
    _record_outputs(model)


def _was_causal(config: PreTrainedConfig) -> bool:
    """Return whether the upcycled model that was saved with a configuration was a language model that generates."""
    kind = class_named(str((config.architectures or [""])[0]))
    return kind is not None and issubclass(kind, Upcycled) and bool(cast(Any, kind).can_generate())


def _adopt_configs(model: PreTrainedModel) -> None:
    plain = _plain_kind(model.config)
    for module in model.modules():
        config = getattr(module, "config", None)  # a stack of T5 has a copy of its own
        if type(config) is plain:
            config.__class__ = config_class(plain)


def _record_outputs(model: PreTrainedModel) -> None:
    """Let hidden states and attentions be recorded, for which transformers notes each class that is constructed."""
    bare = object.__new__(type(model))
    PreTrainedModel.__init__(bare, copy.deepcopy(model.config))  # without the modules of any model


def plain_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the plain class of a class of models, upcycled or not."""
    return kind.plain if issubclass(kind, Upcycled) else kind


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration as of the dense model: of the plain class, without the entry ``camex``."""
    made = copy.deepcopy(config)
    made.__dict__.pop(entry.KEY, None)
    made.__class__ = _plain_kind(made)
    made.architectures = [name.removeprefix(NAME) for name in made.architectures or ()] or None
    return made


def _plain_kind(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    kind = type(config)
    return kind.plain if issubclass(kind, UpcycledConfig) else kind


def class_named(name: str) -> type[PreTrainedModel] | None:
    """Return the class of models that ``architectures`` names, plain or upcycled; None where there is none."""
    with _lock:
        own = [
            kind for kind in _made.values() if kind.__name__ == name
        ]  # also of classes that are not transformers'
    found = own[0] if own else getattr(transformers, name.removeprefix(NAME), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    return model_class(found) if name.startswith(NAME) else found


def __getattr__(name: str) -> Any:
    """Make a class when it is first asked for by name, by an import or from a pickle."""
    plain = getattr(transformers, name.removeprefix(NAME), None) if name.startswith(NAME) else None
    if isinstance(plain, type) and issubclass(plain, PreTrainedConfig):
        return config_class(plain)
    found = class_named(name) if name.startswith(NAME) else None
    if found is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return found
