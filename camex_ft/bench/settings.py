"""Settings of a benchmark: sizes, protocol, number format, device. Checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

from camex_ft.config.backbones import EMBEDDED
from camex_ft.config.schema import CurvatureConfig
from camex_ft.utils.errors import UserError, among
from camex_ft.utils.registry import EMBEDDED as FAMILIES
from camex_ft.utils.registry import PROTOCOLS
from camex_ft.utils.system import cuda_is_there

DTYPES = ("float32", "bfloat16", "float64")
DEVICES = ("cpu", "cuda")
CURVATURES: tuple[str, ...] = get_args(CurvatureConfig.model_fields["kind"].annotation)  # the default first
PUBLISHED = {  # names of the hub
    "t5-base": "google-t5/t5-base",
    "gpt2": "openai-community/gpt2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
}
OPTIONS = {"in_features": "in", "out_features": "out"}  # where an option's name is not the field's


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Settings of all benchmarks, by the names of the command line's options, where each has its meaning."""

    batch: int = 16
    length: int = 128
    experts: int = 8
    top_k: int | None = None
    rank: int = 1
    curvature: str = "kronecker"
    protocol: str = "ties-ca"
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 5

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range, unknown, or not available on this machine.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                option = OPTIONS.get(field.name, field.name).replace("_", "-")
                raise UserError(f"--{option} is {value}: expected at least 1")
        if self.k > self.experts:
            raise UserError(f"--top-k is {self.k}: expected at most {self.experts}, the number of experts")
        for name, known in (("dtype", DTYPES), ("device", DEVICES), ("curvature", CURVATURES)):
            _check_known(name, getattr(self, name), known)
        self.check_form(PROTOCOLS.get(self.protocol).form)
        if self.device == "cuda" and not cuda_is_there():
            raise UserError("--device is cuda: torch sees no CUDA device here")

    def check_form(self, form: str) -> None:
        """Refuse protocols of a form that this benchmark cannot compare (`UserError`)."""

    @property
    def k(self) -> int:
        """Experts that serve a sequence."""
        return self.experts if self.top_k is None else self.top_k

    @property
    def effective_rank(self) -> int:
        """The curvature's rank, 0 where the protocol has none."""
        return self.rank if PROTOCOLS.get(self.protocol).curvature else 0

    def to_record(self) -> dict[str, Any]:
        """Return the settings by the names of the options, `top_k` and `rank` as they take effect."""
        plain = {OPTIONS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        return {**plain, "top_k": self.k, "rank": self.effective_rank}

    def name(self) -> str:
        """Return the record's name, ``<kind>-<protocol>-<shape>``: other settings have another one."""
        raise NotImplementedError

    def _experts(self) -> str:
        rank = f"-r{self.effective_rank}" if self.effective_rank else ""
        kind = f"-{self.curvature}" if self.effective_rank and self.curvature != CURVATURES[0] else ""
        return f"n{self.experts}-k{self.k}{kind}{rank}-{self.dtype}-{self.device}"


@dataclass(frozen=True, kw_only=True)
class LayerBench(Bench):
    """One linear map, ``out x in``; for protocols that merge weights."""

    in_features: int = 768
    out_features: int = 3072
    evaluate: bool = False
    skip_plain: bool = False

    def check_form(self, form: str) -> None:
        """Refuse protocols that merge no weights, and those that propagate a base expert from one map to another."""
        if form != "weights":
            merging = [name for name in PROTOCOLS.names() if PROTOCOLS.get(name).form == "weights"]
            raise UserError(
                f"bench layer is for protocols that merge the weights of one map by itself, which {self.protocol} "
                f"does not: choose one of {', '.join(merging)}"
            )

    def name(self) -> str:
        """Return the record's name."""
        how = ("-evaluate" if self.evaluate else "") + ("-skip-plain" if self.skip_plain else "")
        shape = f"b{self.batch}-l{self.length}-{self.in_features}x{self.out_features}"
        return f"layer-{self.protocol}-{shape}-{self._experts()}{how}"


@dataclass(frozen=True, kw_only=True)
class CostBench(LayerBench):
    """One linear map over the shapes of `bench.layer`: batch, length, experts and rank are of that list."""

    protocol: str = "domain"
    skip_plain: bool = True

    def to_record(self) -> dict[str, Any]:
        """Return the settings that all shapes share."""
        shared = ("in", "out", "dtype", "device", "repeats")
        return {key: value for key, value in super().to_record().items() if key in shared}

    def name(self) -> str:
        """Return the record's name."""
        return f"cost-{self.in_features}x{self.out_features}-{self.dtype}-{self.device}"


@dataclass(frozen=True, kw_only=True)
class BackboneBench(Bench):
    """A whole backbone with experts in every layer, beside the dense one: of `PUBLISHED`, or ``embedded/<family>``."""

    batch: int = 8
    backbone: str = "t5-base"

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_backbone(self.backbone)
        if self.experts < 2:
            raise UserError(f"--experts is {self.experts}: upcycling needs at least 2")

    def check_form(self, form: str) -> None:
        """Refuse the protocol that has no experts."""
        if form == "dense":
            raise UserError(
                f"this benchmark compares a protocol with the dense model, which {self.protocol} keeps"
            )

    def _shape(self) -> str:
        return f"{self.backbone.replace('/', '-')}-b{self.batch}-l{self.length}"


@dataclass(frozen=True, kw_only=True)
class StepBench(BackboneBench):
    """One training step."""

    def name(self) -> str:
        """Return the record's name."""
        return f"step-{self.protocol}-{self._shape()}-{self._experts()}"


@dataclass(frozen=True, kw_only=True)
class DecodeBench(BackboneBench):
    """Tokens that are generated one by one, with a key-value cache, in the segment in which the prompt ends."""

    batch: int = 1
    length: int = 300
    backbone: str = "gpt2"
    tokens: int = 16
    segment: int = 256
    same_prompt: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        left = self.segment - self.length % self.segment
        if self.tokens >= left:
            raise UserError(
                f"--tokens is {self.tokens}: expected fewer than {left}, since after a prompt of {self.length} the "
                f"segment of {self.segment} has {left} tokens left"
            )

    def name(self) -> str:
        """Return the record's name."""
        same = "-same" if self.same_prompt else ""
        return f"decode-{self.protocol}-{self._shape()}-t{self.segment}-{self._experts()}{same}"


def check_backbone(name: str) -> None:
    """Raise `UserError` for an unknown name of a backbone."""
    _check_known("backbone", name, (*PUBLISHED, *(EMBEDDED + family for family in FAMILIES.names())))


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} '{value}'.{among(value, known)}")
