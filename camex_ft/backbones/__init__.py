"""Backbone families: where the FFNs are, what their matrices are called, which mask applies."""

from camex_ft.backbones.base import (
    DenseFFN,
    Family,
    MixtureRouting,
    SparseFFN,
    family_for,
    family_of,
    generates,
    plain_type,
    register,
    select_layers,
)

__all__ = [
    "DenseFFN",
    "Family",
    "MixtureRouting",
    "SparseFFN",
    "family_for",
    "family_of",
    "generates",
    "plain_type",
    "register",
    "select_layers",
]
