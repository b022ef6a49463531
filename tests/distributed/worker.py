"""One of several processes: `torchrun worker.py FOLDER JOB ...`, JOB a protocol, `save`, `resume` or `case:NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import PartialState

from tests.helpers.distributed_matrix import CASES, outcome
from tests.helpers.distributed_training import SGD, keep, make


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
