"""Print `docs/protocols.md` from the registry: ``python scripts/docs/protocols.py > docs/protocols.md``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from camex_ft.config.document import type_words
from camex_ft.config.problems import show
from camex_ft.protocols import CURVATURE_AWARE, Protocol
from camex_ft.utils.escaping import markdown_cell
from camex_ft.utils.registry import PROTOCOLS

HEAD = """\
# Protocols

Generated from the registry by `python scripts/docs/protocols.py > docs/protocols.md`. Do not edit it by hand.

A protocol says how a layer's experts serve an input. It is one word of a configuration, and its own options stand
beside it:

```yaml
extends: glue
merging: {protocol: ties, options: {density: 0.5}}
```

Notation (more in [the method](method.md)): `E_i` the experts' weights, `E_m` the base expert's, `tau_i = E_i - E_m` the
domain vectors, `s_i` the routing weights, `alpha` the step size `merging.alpha`, `multiplier_i` the protocol's
multiplier, `M_i` the learned curvature. A protocol with a base expert merges to

    E_hat = E_m + alpha * sum_i s_i multiplier_i * M_i tau_i

A name that ends in `-ca` is the same protocol with curvature. Protocols whose form is "the base expert is propagated"
have curvature too; for the others `M_i` is the identity. What a protocol does to a weight matrix it does to the bias as
well.

"""
FORMS = {
    "dense": "no experts",
    "outputs": "outputs are mixed",
    "weights": "weights are merged",
    "dynamic": "weights are merged, the base expert is propagated",
}
ARGUMENTS = "Args:"


def document() -> str:
    """Return the reference of all protocols in Markdown."""
    every: list[Protocol] = [PROTOCOLS.get(name) for name in PROTOCOLS.names()]
    plain = [p for p in every if not p.name.endswith(CURVATURE_AWARE)]
    return HEAD + _overview(every) + "\n" + "\n".join(_section(p, _twin(p, every)) for p in plain)


def _overview(every: list[Protocol]) -> str:
    rows = ["| protocol | what it does | form | base expert | curvature |", "|---|---|---|---|---|"]
    for p in every:
        link = f"[`{p.name}`](#{_anchor(p.name.removesuffix(CURVATURE_AWARE))})"
        rows.append(
            f"| {link} | {markdown_cell(p.summary)} | {FORMS[p.form]} | {_yes(p.base)} | {_yes(p.curvature)} |"
        )
    return "\n".join(rows) + "\n"


def _section(protocol: Protocol, twin: Protocol | None) -> str:
    """Describe one protocol; its curvature-aware twin differs in name and source alone."""
    text, meanings = parse(protocol.doc)
    facts = [f"Source: {protocol.source}."]
    if twin is not None:
        facts.append(
            f"With curvature: `{twin.name}`, from {twin.source.removesuffix(f'; {protocol.source}')}."
        )
    if protocol.form != "dense":
        facts.append(f"Granularities: {', '.join(f'`{g}`' for g in protocol.granularities)}.")
    facts.append("Options, under `merging.options`:" if protocol.options else "Options: none.")
    parts = [
        f"## {protocol.name}",
        _sentence(protocol.summary),
        text,
        "\n".join(f"- {fact}" for fact in facts),
    ]
    if protocol.options:
        parts.append(_options(protocol.options, meanings))
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(options: Mapping[str, inspect.Parameter], meanings: Mapping[str, str]) -> str:
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, option in options.items():
        required = option.default is inspect.Parameter.empty
        default = "none: it must be given" if required else f"`{show(option.default)}`"
        cells = (type_words(option.annotation), default, _sentence(meanings.get(name, "")))
        rows.append(f"| `{name}` | {' | '.join(map(markdown_cell, cells))} |")
    return "\n".join(rows)


def parse(doc: str) -> tuple[str, dict[str, str]]:
    """Return a docstring's text before ``Args:``, and the meaning of each argument in one line."""
    text, _, arguments = doc.partition(f"\n{ARGUMENTS}\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in arguments.splitlines():
        begins = re.match(r" {4}(\w+): (.*)", line)
        if begins:
            name, meanings[begins[1]] = begins[1], begins[2]
        elif name and line.startswith(" " * 8):
            meanings[name] += " " + line.strip()
        elif line.strip():
            break  # the next part of the docstring
    return text.strip(), meanings


def _twin(protocol: Protocol, every: list[Protocol]) -> Protocol | None:
    return next((p for p in every if p.curvature and p.name == protocol.name + CURVATURE_AWARE), None)


def _sentence(text: str) -> str:
    """End with a point and begin with a capital, but not in place of a symbol: "p, the probability"."""
    first = text[:1].upper() if text[1:2].isalpha() else text[:1]
    return first + text[1:].rstrip(".") + "." if text else ""


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _yes(fact: bool) -> str:
    return "yes" if fact else ""


if __name__ == "__main__":
    print(document(), end="")
