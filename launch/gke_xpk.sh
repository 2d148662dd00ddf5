#!/usr/bin/env bash
# One phase of training on GKE, as a workload of an XPK cluster (TPU slices or GPU nodes).
#
#   launch/gke_xpk.sh --cluster C --zone Z --type v5litepod-16 --image IMAGE [--slices 2] [--name N] \
#       -- --config configs/stage3.py:phi2 --workdir /data/runs/stage3 ...
#   launch/gke_xpk.sh --dry-run ...                    prints the command
#
# Needs: xpk (pip install xpk), gcloud and kubectl, signed in; a cluster made with `xpk cluster create`
# or `xpk cluster adapt`; IMAGE built from launch/Dockerfile (target tpu or gpu) and pushed to a
# registry that the cluster reads; storage that all pods see at the same path (`xpk storage attach`).
# Costs to change: --type (--device-type of xpk; for GPUs as in h100-80gb-8), --slices (each is one
# group of hosts; the `data` axis spans them).
# All arguments behind -- go to `python -m medmoe_jax.train` as they are. The pods find each other by
# themselves. A pod that is told to end saves and ends with status 75; --max-restarts starts the
# workload again, and it goes on from its checkpoint.
set -euo pipefail

usage() {
  sed -n '2,18p' "$0" >&2
  exit 2
}
dry_run=no cluster="" zone="" type="" image="" slices=1 name="medmoe" restarts=10 arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes && shift ;;
    --cluster) cluster=$2 && shift 2 ;;
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --image) image=$2 && shift 2 ;;
    --slices) slices=$2 && shift 2 ;;
    --name) name=$2 && shift 2 ;;
    --max-restarts) restarts=$2 && shift 2 ;;
    --) shift && arguments=("$@") && break ;;
    *)
      echo "error: $1 is unknown" >&2
      usage
      ;;
  esac
done
for option in cluster zone type image; do
  if [ -z "${!option}" ]; then
    echo "error: --$option is missing" >&2
    exit 2
  fi
done
if [ ${#arguments[@]} -eq 0 ]; then
  echo "error: put the arguments of medmoe_jax.train behind --" >&2
  exit 2
fi

command=(xpk workload create --cluster="$cluster" --zone="$zone" --workload="$name"
  --device-type="$type" --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts"
  --restart-on-exit-codes=75
  --command="python -m medmoe_jax.train$(printf ' %q' "${arguments[@]}")")
if [ "$dry_run" = yes ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
