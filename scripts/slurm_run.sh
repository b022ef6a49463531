#!/usr/bin/env bash
# One run over several nodes of a SLURM cluster. The rest of the line is what `camex-ft run` takes.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 scripts/slurm_run.sh glue task.name=mnli profile=paper
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_run.sh --engine fsdp configs/glue.yaml task.name=mnli
#
# One task a node: camex-ft starts a process a GPU itself, and reads from SLURM which node is the first. A process that
# fails ends the run on its node, and --kill-on-bad-exit that on the others. Three minutes before the time is up the run is
# warned, saves the step under way and ends. Submit the same again: it goes on. Variables:
#   VENV=.venv    where camex_ft is installed, on a disk that all nodes see, as output.dir must be
#SBATCH --job-name=camex-ft
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@180
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
VENV=${VENV:-.venv}

fail() {
    echo "error: $*" >&2
    exit 2
}

(($#)) || fail "name a configuration: sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_run.sh glue task.name=mnli"
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is for sbatch; without SLURM: $VENV/bin/camex-ft run --gpus N $*"
[[ -x $VENV/bin/camex-ft ]] || fail "there is no $VENV/bin/camex-ft: run make install, or set VENV"

gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
[[ $gpus =~ ^[0-9]+$ ]] || fail "how many GPUs has a node? Expected sbatch --gpus-per-node=8, and found '${gpus:-nothing}'"

exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$VENV/bin/camex-ft" run --gpus "$gpus" "$@"
