#!/usr/bin/env bash
# Run the test suite in an odd environment: offline, of a cluster's job, in another locale, with a strict umask.
#
#   scripts/odd_environment.sh                       # all but the slow tests
#   scripts/odd_environment.sh tests/hf tests/exporting
#
# Tests make their own environment (tests/helpers/own_environment.py), so that they pass here as anywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 077
exec env \
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_ENDPOINT=http://127.0.0.1:9 HF_HOME=/proc/none HF_TOKEN=none \
    TRANSFORMERS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=7 OMP_NUM_THREADS=1 \
    LC_ALL=C LANG=tr_TR.UTF-8 TZ=Pacific/Kiritimati PYTHONHASHSEED=12345 \
    NO_COLOR=1 FORCE_COLOR=1 COLUMNS=31 LINES=7 TERM=dumb \
    XDG_CACHE_HOME=/proc/none XDG_CONFIG_HOME=/proc/none XDG_DATA_HOME=/proc/none \
    WANDB_MODE=online WANDB_API_KEY=none MLFLOW_TRACKING_URI=http://127.0.0.1:9 \
    RANK=3 LOCAL_RANK=3 WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=9 \
    SLURM_JOB_ID=1 SLURM_NTASKS=4 SLURM_PROCID=3 SLURM_NNODES=2 SLURM_JOB_NAME=odd \
    https_proxy=http://127.0.0.1:9 HTTPS_PROXY=http://127.0.0.1:9 \
    "${VENV:-.venv}/bin/python" -m pytest -n "${WORKERS:-logical}" --dist worksteal -m "not slow" "$@"
