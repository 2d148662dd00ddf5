#!/usr/bin/env bash
# All phases of training on one machine, one after the other. Resumes where it was when run again.
#
#   launch/phases.sh SIZE START DATA IMAGES WORKDIR
#   launch/phases.sh --dry-run ...                     prints the commands
#
# SIZE     phi2 | stablelm | tiny | tiny_stablelm
# START    model folder made by `python -m medmoe_jax.convert to-jax`
# DATA     folder with alignment.json, instruct.json and train_all.json
# IMAGES   folder that the image paths in them are relative to
# WORKDIR  folder of the runs; the result is WORKDIR/stage3/model
#
# Needs: the package in the Python of the environment; paths are relative to the repository's folder.
# Costs to change: settings are those of configs/, changed there, or by running a phase's command by
# hand with --config.NAME=VALUE. SIGTERM to the running phase saves it and ends all with status 75.
set -euo pipefail
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
if [ $# -ne 5 ]; then
  sed -n '2,15p' "$0" >&2
  exit 2
fi
size=$1 start=$2 data=$3 images=$4 workdir=$5
cd "$(dirname "$0")/.."

phase() {  # NAME INIT FILE
  local command=(python -m medmoe_jax.train --config "configs/$1.py:$size"
    --workdir "$workdir/$1" --config.init="$2" --config.data.files="('$data/$3',)"
    --config.data.image_folder="$images")
  if [ "$dry_run" = yes ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

phase stage1 "$start" alignment.json
phase stage2 "$workdir/stage1/model" instruct.json
phase router "$workdir/stage2/model" instruct.json
phase stage3 "$workdir/router/model" train_all.json
