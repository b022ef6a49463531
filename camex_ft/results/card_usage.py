"""The Python of a model card: it loads the model, and goes on to a prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from camex_ft.results.card_data import HEADS, Form

FOLDER = "FOLDER"  # what the reader puts in its place
TOKENS = 32  # that a language model generates


class Usage(Protocol):
    """Interface of a task to the code of a card; `camex_ft.tasks.base.Task` has it."""

    @property
    def texts(self) -> Sequence[str]:
        """Names of the texts that a row is made of."""

    @property
    def words(self) -> Sequence[str]:
        """The answers that a text-to-text model chooses among; none where it generates one."""

    @property
    def regression(self) -> bool:
        """Return whether the model returns a number."""


def loading(form: Form, head: str) -> str:
    """Return the lines that load a model."""
    auto = HEADS.get(head, ("", "AutoModel"))[1]
    if form == "adapter":
        return f'import camex_ft\n\nmodel = camex_ft.load("{FOLDER}")'
    plain = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{FOLDER}")'
    return plain if form in ("plain", "dense") else f"import camex_ft\n{plain}"


def predicting(head: str, task: Usage, settings: Mapping[str, Any]) -> str:
    """Return the lines that go on from `loading` to a printed prediction; "" for a head that is not known.

    Args:
        head: of the task.
        task: the texts of a row, and what the model makes of them.
        settings: of the task, as in a configuration; ``max_length``, ``answer_length`` and ``beams`` are read.
    """
    if head not in HEADS:
        return ""
    length = _count(settings, "max_length")
    limits = f", truncation=True, max_length={length}" if length else ""
    names = list(task.texts)
    texts = [json.dumps(f"This is the {name.replace('_', ' ')}.", ensure_ascii=False) for name in names]
    start = [
        "import torch",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
    ]
    if head == "causal-lm":
        return "\n".join([*start, f"prompt = {texts[0]}", *_writing()])
    if head == "seq2seq-lm":
        prompt = " ".join(f"{name}: {json.loads(text)}" for name, text in zip(names, texts, strict=True))
        start += [
            f"text = {json.dumps(prompt, ensure_ascii=False)}",
            f'inputs = tokenizer(text{limits}, return_tensors="pt")',
        ]
        return "\n".join([*start, *(_choosing(task.words) if task.words else _answering(settings))])
    arguments = "first"
    start.append(f"first = {texts[0]}")
    if len(texts) > 1:
        arguments = "first, second"
        start += [
            f"second = {texts[1]}",
            "if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add():",
            '    second = "\\n" + second  # as in training, where the tokenizer puts nothing between two texts',
        ]
    start.append(f'inputs = tokenizer({arguments}{limits}, return_tensors="pt")')
    return "\n".join([*start, *(_measuring() if task.regression else _classifying())])


def _count(settings: Mapping[str, Any], name: str) -> int:
    """Return a setting that is a count; 0 where it is none, since records come from elsewhere."""
    value = settings.get(name)
    return value if type(value) is int and value > 0 else 0


def _classifying() -> list[str]:
    return [
        "with torch.no_grad():",
        "    probabilities = model(**inputs).logits[0].softmax(-1)",
        "for label, probability in zip(model.config.id2label.values(), probabilities.tolist()):",
        '    print(f"{label}: {probability:.4f}")',
    ]


def _measuring() -> list[str]:
    return ["with torch.no_grad():", '    print(f"{model(**inputs).logits.item():.4f}")']


def _writing() -> list[str]:
    return [
        'inputs = tokenizer(prompt, return_tensors="pt")',
        "with torch.no_grad():",
        f"    generated = model.generate(**inputs, max_new_tokens={TOKENS})",
        "print(tokenizer.decode(generated[0], skip_special_tokens=True))",
    ]


def _answering(settings: Mapping[str, Any]) -> list[str]:
    how = [f"max_new_tokens={_count(settings, 'answer_length') or TOKENS}"]
    how += [f"num_beams={beams}"] if (beams := _count(settings, "beams")) > 1 else []
    return [
        "with torch.no_grad():",
        f"    generated = model.generate(**inputs, {', '.join(how)}, forced_eos_token_id=tokenizer.eos_token_id)",
        "print(tokenizer.decode(generated[0], skip_special_tokens=True))",
    ]


def _choosing(words: Sequence[str]) -> list[str]:
    return [
        f"words = {json.dumps(list(words), ensure_ascii=False)}",
        'targets = [tokenizer(word, return_tensors="pt").input_ids for word in words]',
        "with torch.no_grad():  # the loss is the mean over a word's tokens",
        "    scores = torch.stack([-model(**inputs, labels=t).loss * t.shape[1] for t in targets])",
        "for word, probability in zip(words, scores.softmax(0).tolist()):",
        '    print(f"{word}: {probability:.4f}")',
    ]
