"""The environment that tests run in: their own, whatever the caller's shell, cluster or notebook has set."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# What libraries, launchers and terminals read. Variables of the system (PATH, HOME, TMPDIR) and of pytest stay.
PREFIXES = (
    "ACCELERATE_",
    "CAMEX_",
    "COMET_",
    "DATASETS_",
    "FSDP_",
    "HF_",
    "HUGGINGFACE_",
    "LC_",
    "MALLOC_",
    "MLFLOW_",
    "PMI_",
    "SLURM_",
    "TORCHELASTIC_",
    "TRACKIO_",
    "TRANSFORMERS_",
    "TTY_",
    "WANDB_",
    "XDG_",
)
NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "TENSORBOARD_LOGGING_DIR", "GITHUB_ACTIONS"),
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "TERM", "COLORTERM"),
    *("PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUTF8", "LANG", "LANGUAGE", "TZ"),
    "PYTHONDONTWRITEBYTECODE",  # else each process compiles the package, and each worker rewrites all assertions
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
}
OWN = {"LANG": "C.UTF-8", "TERM": "xterm"}
THREADS = "OMP_NUM_THREADS"  # of the caller where it is a number: `make test` asks for one
UMASK = 0o022


def clean(variables: MutableMapping[str, str]) -> None:
    """Remove what tests must not depend on, and set what they may."""
    for name in list(variables):
        if name.startswith(PREFIXES) or name.upper() in NAMES:
            del variables[name]
    if not variables.get(THREADS, "1").isdecimal():
        del variables[THREADS]
    variables.update(OWN)


def use() -> None:
    """Make this process's environment the tests' own; before any library has read it."""
    clean(os.environ)
    os.umask(UMASK)
