#!/usr/bin/env bash
# One phase of training on GKE, as a workload of an XPK cluster of TPU slices.
#
#   launch/gke_xpk.sh --cluster C --zone Z --type v5litepod-16 --image IMAGE [--slices 2] [--name N] \
#       -- --config configs/stage3.py:phi2 --workdir /data/runs/stage3 ...
#   launch/gke_xpk.sh --dry-run ...                    prints the command
#
# Needs: xpk (pip install xpk), gcloud and kubectl, signed in; a cluster made with `xpk cluster create`
# or `xpk cluster adapt`; storage that all pods see at the same path (`xpk storage attach`), for
# --workdir, the model and the data; an image that the cluster may read:
#   docker build -f launch/Dockerfile --target tpu -t Z-docker.pkg.dev/PROJECT/REPO/medmoe_jax:tpu .
#   docker push Z-docker.pkg.dev/PROJECT/REPO/medmoe_jax:tpu
# Costs to change: --type (--device-type of xpk), --slices (each is one group of hosts; the `data`
# axis spans them), --max-restarts (10). Another version of the code: build, push and start again.
# All arguments behind -- go to `python -m medmoe_jax.train` as they are. The pods find each other by
# themselves. Output: `xpk workload list --cluster C --zone Z` has a link to it; the end of a workload:
# `xpk workload delete --workload N --cluster C --zone Z`, which saves as well.
#
# A pod that is told to end saves and ends with status 75, and the workload is started again from its
# checkpoint. --grace (300) is how many seconds a pod has for it: Phi-2's phase 3 saves 47 GiB, by
# all hosts together (what `python -m medmoe_jax.plan` calls trainable and optimiser). Spot machines are
# gone 30 seconds after they were told to end, whatever --grace says: most models are not saved by
# then, and the run goes on from the last checkpoint that it wrote every --config.log.save_every steps.
#
# GPU nodes are not for this script, since xpk writes their command into YAML between double quotes,
# which the lists of files do not survive; SkyPilot starts them (launch/skypilot.yaml).
set -euo pipefail

usage() {
  sed -n '2,29p' "$0" >&2
  exit 2
}
dry_run=no cluster="" zone="" type="" image="" slices=1 name="medmoe" restarts=10 grace=300
arguments=()
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
    --grace) grace=$2 && shift 2 ;;
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
case $type in
  v[0-9]* | tpu*) ;;
  *)
    echo "error: --type $type is no TPU slice, as v5litepod-16 is; see launch/skypilot.yaml for GPUs" >&2
    exit 2
    ;;
esac
if [ ${#arguments[@]} -eq 0 ]; then
  echo "error: put the arguments of medmoe_jax.train behind --" >&2
  exit 2
fi

# 69: another process was lost, as where a host is taken away before it has saved.
command=(xpk workload create --cluster="$cluster" --zone="$zone" --workload="$name"
  --device-type="$type" --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts"
  --restart-on-exit-codes="69,75" --termination-grace-period-seconds="$grace"
  --command="python -m medmoe_jax.train$(printf ' %q' "${arguments[@]}")")
if [ "$dry_run" = yes ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
