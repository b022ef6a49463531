"""Trained modules, and modules that gradients pass through, by the paths of the dense model."""

from __future__ import annotations

from typing import Any

from torch import nn

from camex_ft.estimate.survey import CROSS


class Flow:
    """Modules that learn, and modules that a gradient passes through.

    A gradient passes through what comes after the first trained parameter of its stack, in the order of the modules; a
    decoder's cross attention passes one on to its encoder.

    Args:
        model: with its parameters frozen or not; None trains everything.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.all = model is None
        self._order: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._trained: set[str] = set()
        self._first = {False: 0, True: 0}
        if model is None:
            return
        config: Any = getattr(model, "config", None)
        self._splits = bool(getattr(config, "is_encoder_decoder", False))
        own: list[str] = []  # modules that hold a trained parameter themselves
        for path, module in model.named_modules():
            self._order[path] = len(self._order)
            for prefix in _prefixes(path):
                self._last[prefix] = self._order[path]
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                own.append(path)
                self._trained.update(_prefixes(path))
        for decoder in (False, True):
            begins = [path for path in own if self._decodes(path) == decoder or "." not in path]
            begins += [p for p in self._order if decoder and p.rpartition(".")[2] in CROSS][:1]
            places = [self._order[path] for path in begins]
            self._first[decoder] = min(places, default=len(self._order))

    def learns(self, path: str) -> bool:
        """Return whether anything in the module at `path` is trained."""
        return self.all or path in self._trained

    def passes(self, path: str) -> bool:
        """Return whether a gradient is wanted at the module's output."""
        return self.all or self._last.get(path, len(self._order)) >= self._first[self._decodes(path)]

    def _decodes(self, path: str) -> bool:
        return self._splits and "decoder" in path.split(".")


def _prefixes(path: str) -> list[str]:
    """Return "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
