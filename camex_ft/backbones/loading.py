"""Backbones under a task head, from what stands after `backbone:`.

load(spec)            -> model with its weights, tokenizer
skeleton(spec)        -> model on the meta device: no weights are read or made
configuration(spec)   -> configuration alone
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from tokenizers import Tokenizer

from camex_ft.backbones import source
from camex_ft.backbones.base import generates
from camex_ft.backbones.heads import CLASSIFIERS, HEADS, heads
from camex_ft.config import gguf
from camex_ft.config.backbones import EMBEDDED, NEW
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import EMBEDDED as EMBEDDED_FAMILIES
from camex_ft.utils.registry import families, not_supported, plain_type

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
log = logging.getLogger(__name__)


def load(
    spec: str,
    *,
    head: str = "sequence-classification",
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    regression: bool = False,
    seed: int = 0,
    texts: Iterable[str] | None = None,
    path: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the backbone `spec` under `head`, in float32 on the CPU, in evaluation mode, and its tokenizer.

    Weights that the checkpoint lacks (a new head) are drawn from `seed`, and with ``new:`` all of them; the global
    random state stays as it is. Quantised weights of a GGUF file are turned back into float32. Code that comes with a
    checkpoint is never run, and weights are never read from pickle files.

    Args:
        spec: hub id, folder, .gguf file, ``package:NAME/PATH`` or ``embedded/<family>``; the first four also after
            ``new:``. See `camex_ft.config.backbones`.
        head: a key of `heads.HEADS`.
        label_names: names of the classes, kept in the model's config (`id2label`, `label2id`).
        num_labels: number of classes that have no names. With neither, the checkpoint's own labels stay.
        regression: one output and a squared-error loss; excludes the two above.
        seed: of the new weights, and of all weights of an embedded or ``new:`` backbone.
        texts: what an embedded backbone's tokenizer is trained on; None: it knows the words of embedded corpora.
        path: the folder or GGUF file of `spec`, where it has been located already; None: it is located here.

    Raises:
        UserError: `spec` or the checkpoint is at fault: unknown, incomplete, corrupt, of a family that is not
            supported, without that head, or out of reach.
        ValueError: the arguments contradict each other.
    """
    if head not in HEADS:
        raise UserError(f"unknown head '{head}'.{nearest(head, HEADS)} Known heads: {', '.join(HEADS)}")
    labels = label_fields(head, label_names, num_labels, regression)
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if source.kind(spec) == "embedded":
        tiny = EMBEDDED_FAMILIES.get(spec.removeprefix(EMBEDDED))
        model, tokenizer = tiny.backbone(head=head, seed=seed, texts=texts, **labels)
    else:
        path = path or source.locate(spec)
        about = source.check_files(path, spec)
        config = read_config(path, spec, head, labels)
        tokenizer = read_tokenizer(path, spec)
        if spec.startswith(NEW):
            model = _new_model(config, head=head, seed=seed)
        else:
            model = _model(path, spec, config=config, head=head, seed=seed)
        if isinstance(about, gguf.Header):
            only_its_own(cast("PreTrainedTokenizerFast", tokenizer), about)
            check_all_read(about, config, spec)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = spec
    agree_on_padding(model, tokenizer, spec)
    return model, tokenizer


def configuration(
    spec: str, *, head: str = "sequence-classification", path: Path | None = None, **labels: Any
) -> PreTrainedConfig:
    """Return the configuration of the backbone `spec` under `head`; no model is made of it.

    Args:
        spec, head, path: as of `load`.
        labels: label_names, num_labels and regression, as of `load`.

    Raises:
        UserError: `spec` or its configuration is at fault, or out of reach.
    """
    if head not in HEADS:
        raise UserError(f"unknown head '{head}'.{nearest(head, HEADS)} Known heads: {', '.join(HEADS)}")
    fields = label_fields(head, **labels)
    if source.kind(spec) == "embedded":
        tiny = EMBEDDED_FAMILIES.get(spec.removeprefix(EMBEDDED))
        config: PreTrainedConfig = tiny.configuration(head=head, **fields)[0]
        return config
    path = path or source.locate(spec, weights=False)
    source.check_files(path, spec, weights=False)
    return read_config(path, spec, head, fields)


def skeleton(
    spec: str,
    *,
    head: str = "sequence-classification",
    path: Path | None = None,
    trained_tokenizer: bool = False,
    **labels: Any,
) -> PreTrainedModel:
    """Return the backbone `spec` under `head`, in float32 on the meta device, in training mode.

    No weights are read or made. Of a hub id the small files alone are fetched, of a GGUF file the header is read.

    Args:
        spec, head, path, labels: as of `configuration`.
        trained_tokenizer: an embedded backbone's tokenizer would be trained on the data: its vocabulary then counts as
            full, which only a very small text leaves it short of.

    Raises:
        UserError: `spec` or its configuration is at fault, or out of reach.
    """
    config = configuration(spec, head=head, path=path, **labels)
    if trained_tokenizer:
        config.vocab_size = EMBEDDED_FAMILIES.get(spec.removeprefix(EMBEDDED)).trained_size
    config.__dict__.pop("quantization_config", None)  # of the weights that are not read
    with torch.device("meta"):
        model: PreTrainedModel = HEADS[head].from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.train()


def label_fields(
    head: str,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    regression: bool = False,
) -> dict[str, Any]:
    """Return the configuration's fields for the labels, or none if nothing is said about them."""
    if not (label_names or num_labels or regression):
        return {}
    if head not in CLASSIFIERS:
        raise ValueError(f"the head '{head}' has no labels")
    if regression and (label_names or num_labels not in (None, 1)):
        raise ValueError("a regression has one output and no classes")
    if label_names and num_labels not in (None, len(label_names)):
        raise ValueError(f"{len(label_names)} label names for {num_labels} labels")
    names = label_names or [f"LABEL_{i}" for i in range(num_labels or 1)]
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if head == "sequence-classification":
        fields["problem_type"] = "regression" if regression else "single_label_classification"
    return fields


def agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    """Give the tokenizer a padding token (its end token, if it has none) and the model's config the same one.

    Raises:
        UserError: the tokenizer has neither, or more tokens than the model `spec` embeds.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"backbone {spec}: its tokenizer has neither a padding token nor an end token to pad with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"backbone {spec}: tokenizer and model do not belong together: "
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}"
        )


def read_config(path: Path, spec: str, head: str, labels: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration in the folder or GGUF file `path` of `spec`, with these fields for the labels.

    Raises:
        UserError: it is broken, of a family that is not supported, or without that head.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(**where(path), trust_remote_code=False, **labels)
    except Exception as error:  # transformers raises many types here; each one is about the file's content
        what = path.name if path.is_file() else "config.json"
        raise UserError(f"backbone {spec}: its {what} is not usable: {_one_line(error)}") from error
    if plain_type(config.model_type) not in families():
        raise UserError(f"backbone {spec}: it {not_supported(config.model_type)}")
    known = heads(config)
    if head not in known:
        raise UserError(
            f"backbone {spec}: {config.model_type} has no head '{head}'; it has {', '.join(known)}"
        )
    return config


def read_tokenizer(path: Path, spec: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder or GGUF file `path` of `spec`; `UserError` if there is none."""
    # Without these some tokenizers load all the same, and then know nothing but their special tokens.
    if path.is_dir() and not any((path / file).is_file() for file in VOCABULARIES):
        raise UserError(
            f"backbone {spec}: the folder has no tokenizer: expected one of {', '.join(VOCABULARIES)}"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            **where(path), trust_remote_code=False
        )
        tokenizer("a", "b")  # what is wrong with it may show only here
        return tokenizer
    except Exception as error:
        raise UserError(f"backbone {spec}: its tokenizer cannot be loaded: {_one_line(error)}") from error


def _new_model(config: PreTrainedConfig, *, head: str, seed: int) -> PreTrainedModel:
    config.__dict__.pop("quantization_config", None)  # of the weights that are not read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = HEADS[head].from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


def _model(path: Path, spec: str, *, config: PreTrainedConfig, head: str, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            model, report = HEADS[head].from_pretrained(
                **where(path),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head for other labels is made anew; _check_report sees to the rest
                output_loading_info=True,
            )
        except Exception as error:
            raise UserError(
                f"backbone {spec}: the checkpoint cannot be loaded: {_one_line(error)}"
            ) from error
        _check_report(model, report, spec)
    return as_plain(model)


def _check_report(model: PreTrainedModel, report: dict[str, Any], spec: str) -> None:
    """Refuse a checkpoint that lacks weights of the backbone itself; only the head may be new."""
    with torch.device("meta"):
        bare = transformers.AutoModel.from_config(model.config)
    own = {name for name in bare.state_dict() if not name.startswith("pooler.")}
    shapes = {
        name: f"{name} {list(shape)} instead of {list(due)}" for name, shape, due in report["mismatched_keys"]
    }
    new = sorted({*report["missing_keys"], *shapes})
    prefix = f"{model.base_model_prefix}."
    lost = [name for name in new if name in own or name.removeprefix(prefix) in own]
    if lost or report["error_msgs"]:
        examples = [shapes.get(name, name) for name in lost] or report["error_msgs"]
        raise UserError(
            f"backbone {spec}: the checkpoint does not fit its config.json: {len(examples)} weights of the backbone "
            f"are missing or of another shape, such as {', '.join(examples[:3])}"
        )
    if new and generates(model):
        log.warning(
            "backbone %s: the checkpoint has no language-modelling head: %s are new", spec, ", ".join(new)
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting that a new head is new: `_check_report` reads the load report instead."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


# -- GGUF files: transformers turns their weights back into floating point, and this sees to the rest


def where(path: Path) -> dict[str, Any]:
    """Return the arguments by which `from_pretrained` finds the folder, or the GGUF file, at `path`."""
    if not path.is_file():
        return {"pretrained_model_name_or_path": path}
    # with its folder: transformers would look for the bare name in the working folder first
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": str(path)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Take back that `model` is quantised: its weights are not, but transformers would neither train nor save it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
    return model


def only_its_own(tokenizer: PreTrainedTokenizerFast, header: gguf.Header) -> None:
    """Take away, in place, tokens beyond the file's vocabulary.

    For a byte-level vocabulary transformers starts from GPT-2's class, which adds its own end token to one without it:
    a token more than the model embeds.
    """
    count = header.values["tokenizer.ggml.tokens"]
    if len(tokenizer) > count:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < count]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))


def check_all_read(header: gguf.Header, config: PreTrainedConfig, spec: str) -> None:
    """Compare the file's tensors, by shape, with the parameters of the model that it is to fill.

    Raises:
        UserError: the file has more, such as biases that the model has not: transformers drops them without a word.
    """
    whole = HEADS["seq2seq-lm" if config.is_encoder_decoder else "causal-lm"]
    with torch.device("meta"):
        due = Counter(tuple(sorted(p.shape)) for p in whole.from_config(config).parameters())
    left = Counter(tuple(sorted(tensor.shape)) for tensor in header.tensors) - due
    if left:
        examples = ", ".join(f"{count} of shape {list(shape)}" for shape, count in left.most_common(3))
        raise UserError(
            f"backbone {spec}: the file has {sum(left.values())} tensors that transformers does not read into a "
            f"{config.model_type} model ({examples}), so it would compute something else: expected the same model as "
            "a folder with safetensors weights"
        )
