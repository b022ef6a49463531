"""Registration of upcycled models with transformers' auto classes, called by `import camex_ft`.

    AutoConfig.register("camex_bert", CamexBertConfig)
    AutoModelForSequenceClassification.register(CamexBertConfig, CamexBertForSequenceClassification)      and so on

for the types of every backbone family (`camex_ft.upcycling.model_classes`). It imports transformers and the families'
models. Programs of the package do without, and `upcycling.load` registers: see `camex_ft_cli`.
"""

from __future__ import annotations

import warnings

from camex_ft.utils.errors import UserError


def register() -> None:
    """Register the upcycled models of every backbone family; warn of a plug-in that cannot be imported."""
    from camex_ft.upcycling.model_classes import register_families

    try:
        register_families()
    except UserError as error:
        warnings.warn(f"upcycled models are not registered with transformers: {error}", stacklevel=3)
