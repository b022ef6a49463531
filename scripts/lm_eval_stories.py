"""Score causal models with lm-evaluation-harness on two tasks that are made here, of the package's own stories.

    .venv/bin/pip install -c constraints.txt -e '.[lm-eval]'
    python scripts/lm_eval_stories.py results/runs/RUN/model exported/dense

Two tasks, defined by files in the folder `--work` as the harness wants them (one YAML and one JSON lines file each):

    stories   the perplexity of whole stories, by word and by byte
    endings   which of four sentences ends a story? Three others end other stories. By chance 0.25

A folder of an upcycled model is read by the harness's own class for transformers models: `import camex_ft` is all that
it takes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import camex_ft  # noqa: F401 - the harness then reads upcycled models as any other
from camex_ft import synthetic

CHOICES, MOST = 4, 200
METRICS = {"stories": ("word_perplexity", "byte_perplexity"), "endings": ("acc", "acc_norm")}


def write_tasks(work: Path, *, seed: int = 0, rows: int = MOST) -> None:
    """Write both tasks and their rows, taken of the validation split of the embedded corpus, to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    texts = synthetic.corpus("lm/wikitext-2", seed=seed)["validation"]["text"][:]
    stories = [text for text in texts if text.count(". ") >= CHOICES][:rows]
    endings = _endings(stories, random.Random(seed))
    _write(
        work,
        "stories",
        [{"text": text} for text in stories],
        output_type="loglikelihood_rolling",
        doc_to_text="",
    )
    choice: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
    }
    _write(work, "endings", endings, **choice)


def _endings(stories: list[str], random_state: random.Random) -> list[dict[str, Any]]:
    parts = [text.rpartition(". ") for text in stories]
    made = []
    for start, _, end in parts:
        others = sorted({other for _, _, other in parts if other != end})
        choices = [end, *random_state.sample(others, CHOICES - 1)]
        random_state.shuffle(choices)
        made.append({"text": f"{start}.", "choices": choices, "answer": choices.index(end)})
    return made


def _write(work: Path, name: str, rows: list[dict[str, Any]], **how: Any) -> None:
    file = work / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    better = name == "endings"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
        "test_split": "test",
        "doc_to_target": "answer" if better else "text",
        "metric_list": [
            {
                "metric": metric,
                "aggregation": "mean" if better else "weighted_perplexity",
                "higher_is_better": better,
            }
            for metric in METRICS[name]
        ],
        "metadata": {"version": 1},
        **how,
    }
    (work / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def score(model: str, work: Path, *, batch: int = 16) -> dict[str, float]:
    """Return the harness's metrics of the model in a folder, by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(work), include_defaults=False)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=list(METRICS),
        task_manager=manager,
        batch_size=batch,
        bootstrap_iters=0,
        device="cpu",
    )
    results = found["results"]
    return {f"{task} {m}": results[task][f"{m},none"] for task, metrics in METRICS.items() for m in metrics}


def main() -> int:
    """Score every model that is named, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", help="folders of causal models with their tokenizers")
    parser.add_argument(
        "--work", type=Path, default=Path("results/lm-eval"), help="where the tasks are written"
    )
    parser.add_argument("--rows", type=int, default=MOST, help="stories at most")
    asked = parser.parse_args()
    write_tasks(asked.work, rows=asked.rows)
    scored = {model: score(model, asked.work) for model in asked.models}
    names = list(next(iter(scored.values())))
    print(f"camex_ft {version('camex_ft')}, lm_eval {version('lm_eval')}\n")
    print(f"| model | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    for model, metrics in scored.items():
        print(f"| {model} | {' | '.join(f'{metrics[name]:.4f}' for name in names)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
