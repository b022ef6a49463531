"""Registration: options read from signatures, twins derived, duplicates refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from camex_ft.config import Config, load_config
from camex_ft.protocols import MERGED, protocol
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import multiplier_of

CPU = torch.device("cpu")
NINE = ("dare", "dare-ca", "dense", "domain", "domain-ca", "smear", "smoe", "ties", "ties-ca")


@pytest.fixture
def throwaway() -> Iterator[None]:
    """Forget the protocols that a test registers."""
    known = set(PROTOCOLS.names())
    yield
    for name in set(PROTOCOLS.names()) - known:
        PROTOCOLS.remove(name)


def test_the_nine_protocols_are_there() -> None:
    assert set(NINE) <= set(PROTOCOLS.names())


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_every_protocol_says_what_it_is(name: str) -> None:
    found = PROTOCOLS.get(name)
    assert found.name == name and found.summary and found.source
    assert found.form in ("dense", "outputs", "weights", "dynamic")
    assert found.granularities and set(found.granularities) <= set(MERGED)
    assert not (found.base or found.curvature) or found.form in ("weights", "dynamic")
    assert (found.step is not None) == (found.form == "dynamic")


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_a_curved_twin_differs_from_its_protocol_in_the_curvature(name: str) -> None:
    found = PROTOCOLS.get(name)
    if not found.base or found.curvature or found.statistic:
        assert name + "-ca" not in PROTOCOLS.names()
        return
    twin = PROTOCOLS.get(name + "-ca")
    assert twin.curvature and not found.curvature
    assert twin.summary == f"{found.summary}, curvature-aware" and found.source in twin.source
    same = ("form", "base", "function", "granularities", "options")
    assert all(getattr(twin, each) == getattr(found, each) for each in same)


PLUGIN = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
from annotated_types import Ge
from camex_ft.protocols import protocol
if TYPE_CHECKING:
    from torch import Generator, Tensor

@protocol("throwaway", summary="for a test", source="none")
def throwaway(tau: Tensor, *, generator: Generator, floor: Annotated[{bound}, Ge(0)] = 0.5) -> {result}:
    return None
"""


@pytest.mark.parametrize(("result", "multiplies"), [("Tensor | None", True), ("None", False)])
def test_types_of_tensors_may_be_imported_for_type_checks_alone(
    throwaway: None, result: str, multiplies: bool
) -> None:
    exec(PLUGIN.format(bound="float", result=result), {"__name__": "plugin"})
    found = PROTOCOLS.get("throwaway")
    assert get_args(found.options["floor"].annotation) == (float, Ge(0))
    assert (found.multiplier is not None) is multiplies


def test_an_option_of_an_unknown_type_is_refused(throwaway: None) -> None:
    with pytest.raises(NameError, match="Share"):
        exec(PLUGIN.format(bound="Share", result="Tensor"), {"__name__": "plugin"})


def test_options_come_from_the_signature(throwaway: None) -> None:
    @protocol("throwaway", summary="for a test", source="none")
    def weigh(
        tau: Tensor,
        *,
        training: bool,
        generator: torch.Generator,
        share: Annotated[float, Gt(0), Le(1)] = 0.25,
        rounds: int = 2,
    ) -> Tensor | None:
        return torch.full_like(tau, share * rounds * training)

    found = PROTOCOLS.get("throwaway")
    assert list(found.options) == ["share", "rounds"]  # what is passed in is no option
    assert found.options["share"].default == 0.25
    assert get_args(found.options["share"].annotation) == (float, Gt(0), Le(1))
    assert found.options["rounds"].annotation is int
    assert found.random and PROTOCOLS.get("throwaway-ca").options == found.options

    bound = found.bind({"rounds": 3, "share": 0.5})
    keep = multiplier_of(bound, training=True, seed=0)
    assert torch.equal(keep(torch.zeros(2, 3)), torch.full((2, 3), 1.5))
    assert not multiplier_of(bound, training=False, seed=0)(torch.zeros(2, 3)).any()
    assert multiplier_of(found, training=True, seed=0)(torch.zeros(1)).item() == 0.5  # bind made a copy


def test_a_registered_protocol_is_in_yaml_at_once(throwaway: None, tmp_path: Any) -> None:
    @protocol("throwaway", summary="for a test", source="none")
    def weigh(tau: Tensor, *, share: Annotated[float, Gt(0), Le(1)] = 0.25) -> Tensor | None:
        return None

    file = tmp_path / "run.yaml"
    file.write_text("merging: {protocol: throwaway-ca, options: {share: 0.5}}\n")
    assert isinstance(load_config(str(file), []), Config)
    for wrong, said in (("share: 2.0", "share"), ("shade: 0.5", "share"), ("share: much", "share")):
        file.write_text(f"merging: {{protocol: throwaway-ca, options: {{{wrong}}}}}\n")
        with pytest.raises(UserError, match=said):
            load_config(str(file), [])


def test_shipped_options_and_bounds() -> None:
    def bounds(name: str, option: str) -> tuple[Any, ...]:
        return get_args(PROTOCOLS.get(name).options[option].annotation)

    assert bounds("ties", "density") == (float, Gt(0), Le(1))
    assert bounds("dare-ca", "drop") == (float, Ge(0), Lt(1))
    assert PROTOCOLS.get("dare").options["drop"].default == 0.1
    assert not PROTOCOLS.get("domain").options


def test_forms_without_domain_vectors_get_no_multiplier(throwaway: None) -> None:
    @protocol("throwaway", summary="for a test", source="none", form="outputs")
    def weigh(tau: Tensor) -> Tensor:
        raise AssertionError("never called")

    found = PROTOCOLS.get("throwaway")
    assert found.function is None and not found.base and not found.random
    assert found.bind({}) is found
    assert "throwaway-ca" not in PROTOCOLS.names()


@pytest.mark.parametrize("name", ["ties", "ties-ca"])
def test_a_name_is_registered_once(name: str) -> None:
    before = PROTOCOLS.get(name)
    with pytest.raises(ValueError, match=f"protocol '{name}' is registered twice"):
        protocol(name, summary="again", source="none")(before.function)
    assert PROTOCOLS.get(name) is before


def test_an_unknown_protocol_gets_the_nearest_name_and_the_list() -> None:
    with pytest.raises(UserError, match="unknown protocol 'tiess'") as error:
        PROTOCOLS.get("tiess")
    assert "Did you mean 'ties'?" in str(error.value)
    assert all(name in str(error.value) for name in NINE)


@pytest.mark.parametrize("name", [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).function is not None])
def test_functions_are_pure_and_documented(name: str) -> None:
    found = PROTOCOLS.get(name)
    assert inspect.getdoc(found.function)
    tau = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    before = tau.clone()
    keep = multiplier_of(found, training=True, seed=1)
    multiplier = keep(tau)
    assert torch.equal(tau, before)
    if multiplier is not None:
        assert multiplier.shape == tau.shape and multiplier.dtype == tau.dtype
        assert torch.equal(keep(tau), multiplier)
