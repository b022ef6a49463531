"""Combinations that can't be: rules that look at several keys at once, or at the registries."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from camex_ft.config.backbones import EMBEDDED, read_config
from camex_ft.config.problems import Key, expected, show
from camex_ft.config.schema import CHECKPOINTS, OWN_EXPERTS, Config
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError, nearest

Broken = tuple[tuple[Key, ...], str]
CHOICE = "expert-choice"
DENSE = "dense"
DROPPED = "drop draws whole units anew, beyond a low rank: expected copy or noise, or tuning.mode: experts"
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def broken(config: Config) -> Iterator[Broken]:
    """Yield each broken rule: the keys that it is about, the one to show first, and the message."""
    yield from _task(config)
    yield from _options_of_task(config)
    yield from _backbone(config)
    yield from _merging(config)
    yield from _choice(config)
    yield from _donors(config)
    yield from _own_experts(config)
    yield from _fit(config)
    yield from _tuning(config)
    yield from _training(config)
    if config.data.source == "disk" and config.data.dir is None:
        yield (("data", "source"), ("data", "dir")), "disk needs data.dir, the folder with the data"
    if config.data.domain is not None and config.data.source not in ("auto", "embedded"):
        yield (
            (("data", "domain"), ("data", "source")),
            f"the data of source {config.data.source} do not know their domains: expected data.source: embedded, or "
            "a folder for each domain",
        )


def _task(config: Config) -> Iterator[Broken]:
    suite, name, names = ("task", "suite"), ("task", "name"), registry.TASKS.names()
    suites = sorted({known.partition("/")[0] for known in names})
    if config.task.suite not in suites:
        hint = nearest(config.task.suite, suites)
        yield (suite,), f"unknown suite '{config.task.suite}'.{hint} Known suites: {', '.join(suites)}"
    elif config.task.id not in names:
        within = [known.partition("/")[2] for known in names if known.startswith(f"{config.task.suite}/")]
        others = sorted(
            {known.partition("/")[0] for known in names if known.endswith(f"/{config.task.name}")}
        )
        hint = f" It belongs to suite {others[0]}." if others else nearest(config.task.name.lower(), within)
        message = f"unknown task '{config.task.name}' of suite {config.task.suite}.{hint} Known: {', '.join(within)}"
        yield (name, suite), message


def _options_of_task(config: Config) -> Iterator[Broken]:
    """Check the options of the task's kind against each other, and its data against the hub."""
    task = config.task
    for keys, message in task.problems():
        yield tuple(("task", key) for key in keys), message
    known = task.id in registry.TASKS.names()
    if known and config.data.source == "hub" and not registry.TASKS.get(task.id).hub:
        yield (
            (("data", "source"), ("task", "name"), ("data", "dir")),
            f"{task.id} is not on the hub: expected data.dir=FOLDER with train.txt and validation.txt, or "
            "profile=embedded",
        )


def _backbone(config: Config) -> Iterator[Broken]:
    key: Key = ("backbone",)
    if config.backbone.startswith(EMBEDDED):
        family, families = config.backbone.removeprefix(EMBEDDED), registry.EMBEDDED.names()
        if family not in families:
            known = ", ".join(EMBEDDED + name for name in families)
            hint = nearest(config.backbone, [EMBEDDED + name for name in families])
            yield (key,), f"unknown embedded backbone '{config.backbone}'.{hint} Known: {known}"
    if config.profile != "paper":
        return
    if config.backbone.startswith(EMBEDDED):
        yield (key, ("profile",)), "profile paper takes no embedded backbone: use profile: embedded"
    if config.data.source == "embedded":
        yield (
            (("data", "source"), ("profile",)),
            "profile paper takes no embedded data: use profile: embedded",
        )


def _merging(config: Config) -> Iterator[Broken]:
    merging, protocol = config.merging, ("merging", "protocol")
    try:
        entry = registry.PROTOCOLS.get(merging.protocol)
    except UserError as error:
        yield (protocol,), str(error)
        return
    experts, top_k = ("merging", "experts"), ("merging", "top_k")
    if entry.form == "dense":
        if config.tuning.mode not in ("full", "lora"):
            yield (("tuning", "mode"), protocol), "protocol 'dense' has no experts to train: use full or lora"
    elif merging.experts < 2:
        yield (
            (experts, protocol),
            f"expected at least 2, got {merging.experts}; one expert is the protocol 'dense'",
        )
    elif merging.k > merging.experts:
        message = f"expected at most merging.experts, which is {merging.experts}, got {merging.top_k}"
        yield (top_k, experts), message
    granularity = config.routing.granularity
    if granularity not in ("auto", *entry.granularities):
        allowed = ", ".join(("auto", *entry.granularities))
        message = f"protocol '{entry.name}' does not allow '{granularity}': expected one of {allowed}"
        yield (("routing", "granularity"), protocol), message
    yield from _options(entry, merging.options)


def _choice(config: Config) -> Iterator[Broken]:
    """Check whether experts may choose tokens: where outputs are mixed, and no token is generated from the last."""
    router, protocol, merging = ("routing", "router"), ("merging", "protocol"), config.merging
    if config.routing.router != CHOICE or merging.protocol not in registry.PROTOCOLS.names():
        return
    entry = registry.PROTOCOLS.get(merging.protocol)
    if entry.form not in ("outputs", "dense"):
        yield (
            (router, protocol),
            f"expert-choice lets experts take tokens, and protocol '{entry.name}' merges weights: expected linear or "
            "cosine, or merging.protocol: smoe",
        )
    if entry.form != "outputs" or config.task.id not in registry.TASKS.names():
        return
    head = registry.TASKS.get(config.task.id).head
    both = head == "seq2seq-lm" and isinstance(config.upcycle.layers, str)  # a list may leave the decoder out
    if head == "causal-lm" or both:
        yield (
            (router, ("task", "suite")),
            f"expert-choice sees a sequence's future, and the model of {config.task.id} generates: expected linear or "
            "cosine" + (", or upcycle.layers: a list of the encoder's" if both else ""),
        )


def _donors(config: Config) -> Iterator[Broken]:
    """Check the donors, which the experts start as, against the number of experts."""
    upcycle, donors, init = config.upcycle, ("upcycle", "from"), ("upcycle", "init")
    if upcycle.init != CHECKPOINTS:
        if upcycle.donors:
            yield (
                (donors, init),
                f"no donor is read with upcycle.init: {upcycle.init}: expected init: checkpoints with it",
            )
        return
    if upcycle.count < 2:
        yield (
            (init, donors),
            "checkpoints needs donors for at least 2 experts: expected upcycle.from: [DONOR, DONOR, ...], each a "
            "folder, a hub id or adapter:FOLDER",
        )
    elif config.merging.protocol != DENSE and upcycle.count != config.merging.experts:
        yield (
            (("merging", "experts"), donors),
            f"{len(upcycle.donors)} donors give {upcycle.count} experts, got {config.merging.experts}: leave "
            "merging.experts out, or set upcycle.each, the experts from each donor",
        )


def mixture_of(backbone: str, *, fetch: bool = False) -> tuple[str, Any] | None:
    """Return a backbone's type and the routing of its mixtures, or None where its layers are dense.

    Args:
        backbone: its name.
        fetch: ask the hub where its cache does not have the backbone's configuration.

    Returns:
        None altogether where the configuration is not at hand, or not one that a family serves.
    """
    if backbone.startswith(EMBEDDED):
        return backbone, None
    values = read_config(backbone, fetch=fetch)
    family = registry.families().get(registry.plain_type(getattr(values, "model_type", "")))
    if family is None:
        return None
    try:
        return values.model_type, None if family.routing is None else family.routing(values)
    except (UserError, TypeError, ValueError):
        return None  # reported where the backbone is checked


def not_from_mixture(init: str, model_type: str, mixture: Any, mode: str) -> str:
    """Return the reason why a backbone cannot start in this way, with alternatives; "" if it can.

    Args:
        init: how experts start.
        model_type: of the backbone.
        mixture: routing of the backbone's mixtures; None: its layers are dense.
        mode: of tuning.
    """
    if mixture is None:
        return (
            f"upcycle.init: {OWN_EXPERTS} takes the experts of a sparse mixture, and the layers of {model_type} are "
            "dense: expected copy, noise, drop or checkpoints"
            if init == OWN_EXPERTS
            else ""
        )
    if init != OWN_EXPERTS:
        return (
            f"upcycle.init: {init} makes experts of dense layers, and {model_type} is a sparse mixture, which has "
            f"experts already: expected {OWN_EXPERTS}"
        )
    if mode == "lora":
        return (
            f"tuning.mode: lora makes experts of low rank, and those of {OWN_EXPERTS} are whole matrices: expected "
            "tuning.mode: experts, or merging.protocol: dense for LoRA on attention"
        )
    return ""


def _own_experts(config: Config) -> Iterator[Broken]:
    """Check the start against the backbone, and the numbers of experts against those of its mixtures."""
    init, merging = ("upcycle", "init"), config.merging
    if merging.protocol == DENSE:
        return
    known = mixture_of(config.backbone)
    if known is None:
        return
    model_type, mixture = known
    why = not_from_mixture(config.upcycle.init, model_type, mixture, config.tuning.mode)
    if why:
        key = ("tuning", "mode") if why.startswith("tuning") else init
        yield (key, ("backbone",)), why.partition(": ")[2]
    elif mixture is not None:
        for name in ("experts", "top_k"):
            said, own = getattr(merging, name), getattr(mixture, name)
            if said is not None and said != own:
                yield (("merging", name), init), other_number(name, own, said)


def other_number(name: str, own: int, said: int) -> str:
    """Return the message about a number of the section `merging` that is not the mixture's."""
    return (
        f"merging.{name}: got {said}, and the backbone's mixtures have {own}: leave it out with {OWN_EXPERTS}"
    )


def _fit(config: Config) -> Iterator[Broken]:
    """Check whether routers can be fitted: to the donors of the experts, or to a source of texts for each expert."""
    routing, init, sources = config.routing, ("routing", "init"), ("routing", "fit", "from")
    if routing.init != "fit" or config.merging.protocol == DENSE:
        return
    if routing.router == "cosine":
        yield (
            (init, ("routing", "router")),
            "the router that is fitted is linear with an intercept: expected routing.router: linear, or init: random",
        )
    with_donors = config.upcycle.init == CHECKPOINTS
    due = len(config.upcycle.donors) if with_donors else config.merging.experts
    if isinstance(routing.fit.sources, str):
        if not with_donors:
            yield (
                (init, ("upcycle", "init"), sources),
                "fit tells donors apart by their own texts, and there are no donors: expected upcycle.init: "
                "checkpoints, or routing.fit.from with a source of texts for each expert",
            )
    elif len(routing.fit.sources) != due:
        each = "donor" if with_donors else "expert"
        yield (
            (sources, init),
            f"expected one source of texts for each {each}, {due}, got {len(routing.fit.sources)}",
        )


def _tuning(config: Config) -> Iterator[Broken]:
    """Check whether the protocol has what the mode trains, and whether experts can be of low rank."""
    mode, protocol = ("tuning", "mode"), ("merging", "protocol")
    if config.merging.protocol not in registry.PROTOCOLS.names():
        return
    entry = registry.PROTOCOLS.get(config.merging.protocol)
    if config.tuning.mode == "router+curvature" and not entry.curvature and entry.form != "dense":
        yield (
            (mode, protocol),
            f"protocol '{entry.name}' has no curvature: expected mode: router, or a protocol that has one, such as "
            "domain-ca",
        )
    low_rank = config.upcycle.rank is not None and entry.form != "dense"
    if low_rank and config.tuning.mode == "lora":
        yield (
            (("upcycle", "rank"), mode),
            f"with tuning.mode: lora the rank is that of tuning.lora, {config.tuning.lora.rank}: leave upcycle.rank "
            "out",
        )
    elif low_rank:
        mode = ("upcycle", "rank")
    elif config.tuning.mode != "lora":
        return
    why = not_low_rank(entry)
    if why:
        yield (mode, protocol), why
    if config.upcycle.init == "drop" and config.merging.protocol != DENSE:
        yield (("upcycle", "init"), mode), DROPPED


def not_low_rank(entry: Any) -> str:
    """Return the reason why a protocol cannot have experts of low rank, with alternatives; "" if it can."""
    why = ""
    if entry.step is not None:
        why = "propagates the base expert from layer to layer, and in lora every layer's own stays frozen"
    elif entry.function is not None:
        why = "weighs every entry of tau_i = B_i A_i, so that the whole matrix would have to be made"
    if not why:
        return ""
    entries = {name: registry.PROTOCOLS.get(name) for name in registry.PROTOCOLS.names()}
    able = ", ".join(name for name, e in entries.items() if e.step is None and e.function is None)
    return (
        f"protocol '{entry.name}' {why}: expected merging.protocol: one of {able}, or experts as whole matrices "
        "(tuning.mode: experts, and no upcycle.rank)"
    )


def _options(entry: Any, written: dict[str, Any]) -> Iterator[Broken]:
    """Check the protocol's own options by the signature that they come from."""
    protocol: Key = ("merging", "protocol")
    for name, value in written.items():
        key: Key = ("merging", "options", name)
        if name not in entry.options:
            known = f"It has: {', '.join(entry.options)}" if entry.options else "It has none"
            message = f"unknown option of protocol '{entry.name}'.{nearest(name, entry.options)} {known}"
        else:
            message = misfit(entry.options[name].annotation, value)
        if message:
            yield (key, protocol), message
    for name, parameter in entry.options.items():
        if parameter.default is inspect.Parameter.empty and name not in written:
            yield (protocol, ("merging", "options")), f"protocol '{entry.name}' needs merging.options.{name}"


def options_of(entry: Any) -> dict[str, Any]:
    """Return the defaults of a protocol's options."""
    return {k: p.default for k, p in entry.options.items() if p.default is not inspect.Parameter.empty}


def misfit(hint: Any, value: Any) -> str:
    """Return the misfit of `value` with an option's annotation, which may carry its range; "" for none."""
    if hint is inspect.Parameter.empty:
        return ""
    try:
        TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError as error:
        return f"{expected(error.errors()[0])}, got {show(value)}"
    return ""


def _training(config: Config) -> Iterator[Broken]:
    training = config.training
    evaluate, save = ("training", "eval_strategy"), ("training", "save_strategy")
    best = ("training", "load_best_model_at_end")
    if training.global_batch_size is not None and (training.model_extra or {}).get("auto_find_batch_size"):
        yield (
            (("training", "auto_find_batch_size"), ("training", "global_batch_size")),
            f"would give an optimizer step fewer rows than training.global_batch_size, {training.global_batch_size}: "
            "expected one of the two; for less memory with as many rows, raise training.gradient_accumulation_steps",
        )
    yield from _options_of_training(config)
    if not training.load_best_model_at_end:
        return
    last = "or load_best_model_at_end: false, which keeps the last epoch"
    if training.eval_strategy == "no":
        yield (
            (evaluate, best),
            f"the best epoch can't be kept without evaluation: expected epoch or steps, {last}",
        )
    elif training.save_strategy not in (training.eval_strategy, "best"):
        expected = f"expected eval_strategy's '{training.eval_strategy}' or best, {last}"
        yield (save, evaluate, best), f"'{training.save_strategy}' can't keep the best epoch: {expected}"
    elif training.save_strategy == "steps":
        extra = training.model_extra or {}
        each, saving = extra.get("eval_steps") or training.logging_steps, extra.get("save_steps", 500)
        if (each < 1) != (saving < 1) or round(saving * 1e6) % round(each * 1e6):
            message = (
                f"saving every {saving:g} steps can't keep the best of evaluations every {each:g} steps: "
            )
            steps = (("training", "save_steps"), ("training", "eval_steps"), save)
            yield (*steps, evaluate, best), message + f"expected a multiple, {last}"


def _options_of_training(config: Config) -> Iterator[Broken]:
    """Check fields of `transformers.TrainingArguments` against each other and against the task."""
    training, extra = config.training, config.training.model_extra or {}

    def key(name: str) -> Key:
        return ("training", name)

    for one, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if extra.get(one) and extra.get(other):
            yield (key(one), key(other)), f"expected one of {one} and {other}, not both"
    schedule = extra.get("lr_scheduler_type")
    if schedule in ("reduce_lr_on_plateau", "greedy") and training.eval_strategy == "no":
        yield (
            (key("eval_strategy"), key("lr_scheduler_type")),
            f"the schedule {schedule} follows the evaluations: expected epoch or steps",
        )
    if training.save_strategy == "best" and training.eval_strategy == "no":
        yield (
            (key("save_strategy"), key("eval_strategy")),
            "best needs evaluations to choose by: expected epoch, steps or no, or eval_strategy: epoch",
        )
    if not extra.get("dataloader_num_workers"):
        for name in (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        ):
            if extra.get(name):
                yield (
                    (key(name), key("dataloader_num_workers")),
                    "is about the workers that load data, and there are none: expected "
                    "training.dataloader_num_workers of at least 1 with it",
                )
    entry = registry.TASKS.get(config.task.id) if config.task.id in registry.TASKS.names() else None
    if extra.get("label_smoothing_factor") and getattr(entry, "regression", False):
        yield (
            (key("label_smoothing_factor"), ("task", "name")),
            f"labels of {config.task.id} are numbers, and smoothing is of classes: expected 0",
        )
