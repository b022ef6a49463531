"""One of several processes: `torchrun worker.py FOLDER JOB ...`, JOB a protocol, `save`, `resume` or `case:NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "invariants"), str(HERE.parent.parent)]

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from matrix import CASES, outcome  # noqa: E402
from training import SGD, keep, make  # noqa: E402


def main(folder: Path, jobs: list[str]) -> None:
    for job in jobs:
        if job.startswith("case:"):
            name = job.removeprefix("case:")
            found = outcome(CASES[name], folder)
            if PartialState().is_main_process:
                torch.save(found, folder / f"{name}.pt")
            continue
        if job == "save":  # every second step; the end is what resumed runs are held against
            made = make(
                folder / "saved", "ties-ca", double=True, save_strategy="steps", save_steps=4.0, max_steps=8
            )
            made.train()
        elif job == "resume":
            made = make(folder / "resumed", "ties-ca", double=True, max_steps=8)
            made.train(resume_from_checkpoint=str(folder / "saved" / "checkpoint-4"))
        else:
            made = make(folder / job, job, **SGD)
            made.train()
        keep(made, folder / f"{job}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
