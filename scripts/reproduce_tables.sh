#!/usr/bin/env bash
# The tables of the paper, on a GPU node or through SLURM: what configs/tables/ asks for and has not been run yet.
#
#   scripts/reproduce_tables.sh --dry-run               # cells, hours and disk; nothing is run
#   scripts/reproduce_tables.sh                         # run on this node, one process a GPU
#   scripts/reproduce_tables.sh --slurm partition=gpu time=720 mem_gb=32   # an array of jobs, one a cell
#
# Interrupted at any point, the same command goes on. Variables:
#   PROFILE=paper    paper (needs CUDA), or embedded: everything scaled down, on a CPU
#   SPECS="..."      specifications, by default all of configs/tables/
#   JOBS=N           cells at a time: by default one a GPU, of an array 64
#   SET="k=v ..."    changes to every cell, such as output.dir=/scratch/camex
#   VENV=.venv       where camex_ft is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PROFILE=${PROFILE:-paper}
VENV=${VENV:-.venv}
LOGS=${LOGS:-results/comparisons/logs}

fail() {
    echo "error: $*" >&2
    exit 2
}

mode=run
options=()
while (($#)); do
    case $1 in
        --dry-run) mode=estimate ;;
        --slurm) mode=slurm ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *=*) [[ $mode == slurm ]] || fail "'$1' is for --slurm, before it; changes to cells go into SET"
             options+=(--slurm "$1") ;;
        *) fail "there is no option '$1': expected --dry-run, or --slurm KEY=VALUE ..." ;;
    esac
    shift
done

camex=$VENV/bin/camex-ft
[[ -x $camex ]] || fail "there is no $camex: run make install, or set VENV"

read -ra specs <<<"${SPECS:-$(echo configs/tables/*.yaml)}"
read -ra changes <<<"${SET:-}"
for spec in "${specs[@]}"; do
    [[ -f $spec ]] || fail "there is no specification $spec"
done
if [[ $mode == run && $PROFILE == paper ]]; then
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "there is no CUDA device here: run it on a GPU node, with --slurm, or with PROFILE=embedded"
fi

compare=("$camex" compare "${specs[@]}" "profile=$PROFILE" ${changes[@]+"${changes[@]}"})
[[ -z ${JOBS:-} ]] || compare+=(--jobs "$JOBS")

found=$("$camex" doctor)
echo "$found"
! grep -qF '[wrong]' <<<"$found" || fail "mend what is wrong above, then call again"
echo
if [[ $mode == estimate ]]; then
    exec "${compare[@]}" --dry-run
fi
"${compare[@]}" --dry-run | sed -n '/^[0-9]* cells, /,$p' # the sums alone
echo
if [[ $mode == slurm ]]; then
    exec "${compare[@]}" --on slurm ${options[@]+"${options[@]}"}
fi
mkdir -p "$LOGS"
log=$LOGS/reproduce-$(date +%Y%m%d-%H%M%S).log
echo "Log: $log"
# tee outlives Ctrl-C, so that the last lines are in the log too
"${compare[@]}" 2>&1 | tee -i "$log"
