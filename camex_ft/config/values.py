"""Types of the values that the schema's keys take, with what they say of a value that does not fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from unicodedata import category

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _as_bool(value: Any) -> Any:
    return WORDS.get(value.lower(), value) if isinstance(value, str) else value


def _as_layers(value: Any) -> Any:
    if isinstance(value, str) and value in ("all", "every_other"):
        return value
    numbers = isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)
    if not numbers or not value or len(set(value)) != len(value):
        expected = "expected 'all', 'every_other' or a list of different layer numbers such as [0, 2, 4]"
        raise PydanticCustomError("layers", expected)
    return tuple(value)


def _as_place(value: Any) -> Any:
    if isinstance(value, str) and any(category(char) in ("Cc", "Cs") for char in value):
        # a line break would begin a line of a job's script; halves of surrogate pairs are in no file's name
        raise PydanticCustomError("place", "expected a path without control characters")
    return value


def _as_steps(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("steps", "expected at least 1, or -1 for as many as the epochs have")
    return value


def every(value: float) -> float:
    """Return a number of steps, or below 1 a fraction of all steps; `ValueError` for 1.5."""
    if value > 1 and value != int(value):
        raise PydanticCustomError("every", "expected a whole number of steps, or a fraction of them below 1")
    return value


Bool = Annotated[bool, BeforeValidator(_as_bool)]
# What libraries hold in 32 bits; and beyond any model, where a slip of the keyboard would take all memory.
MOST = 2**31 - 1
MOST_EXPERTS = 4096
MOST_RANK = 65_536
Count = Annotated[int, Field(ge=1, le=MOST)]
Experts = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
Steps = Annotated[int, Field(ge=-1, le=MOST), AfterValidator(_as_steps)]
Positive = Annotated[float, Field(gt=0)]
Every = Annotated[float, Field(gt=0), AfterValidator(every)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[str, Field(min_length=1), BeforeValidator(_as_place)]
Layers = Annotated[Any, BeforeValidator(_as_layers)]
Interval = Literal["no", "steps", "epoch"]
