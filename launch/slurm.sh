#!/usr/bin/env bash
# One phase of training under SLURM, on one node or many.
#
#   sbatch launch/slurm.sh --config configs/stage3.py:phi2 --workdir runs/stage3 --config.init=...
#   sbatch --nodes=4 launch/slurm.sh ...                 four nodes, one process each with all its GPUs
#   sbatch --nodes=4 --ntasks-per-node=8 launch/slurm.sh ...   one process for each GPU
#   sbatch --nodes=2 --gpus-per-node=0 launch/slurm.sh ...     without GPUs
#   bash launch/slurm.sh --dry-run ...                   prints what the job would run
#
# Needs: SLURM 20.11 or newer, an environment with `pip install -e '.[cuda]'` that all nodes see
# (MEDMOE_ENV names it, default .venv), and --workdir on a disk that all nodes see. Submit it in the
# repository's folder, where configs/ is. The account, the partition and the time are your cluster's:
# give them to sbatch or in SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT.
# Costs to change: the lines below are defaults; every one of them can be given to sbatch instead.
# All arguments go to `python -m medmoe_jax.train` as they are. The processes find each other by
# jax.distributed; a process takes all GPUs of its node, or its share of them.
# Before the time is up (--signal: 180 seconds, for Phi-2's phase 3 to save 47 GiB; more on a slow
# disk), and where a job is pre-empted (as long as the partition's GraceTime), the processes get
# SIGTERM: they save and end with status 75, and the job is put back into the queue; it goes on from
# its checkpoint. Output: slurm-medmoe-JOB.log.
#
#SBATCH --job-name=medmoe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

saved=75 # exit status of a run that saved and wants to be started again
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
if [ $# -eq 0 ]; then
  sed -n '2,20p' "$0" >&2
  exit 2
fi

environment=${MEDMOE_ENV:-.venv}
command=(srun --kill-on-bad-exit=1 "$environment/bin/python" -m medmoe_jax.train "$@")

if [ "$dry_run" = yes ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is no SLURM job; submit it with sbatch, or look at it with --dry-run" >&2
  exit 2
fi

status=0
"${command[@]}" || status=$?
if [ "$status" -eq "$saved" ]; then
  echo "saved; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
