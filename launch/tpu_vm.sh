#!/usr/bin/env bash
# One phase of training on a Cloud TPU slice that is asked for, set up, used and (if you say so)
# deleted from here.
#
#   launch/tpu_vm.sh create NAME --zone Z --type v5litepod-8      a slice at once
#   launch/tpu_vm.sh queue  NAME --zone Z --type v5litepod-16 [--spot]   a queued resource
#   launch/tpu_vm.sh setup  NAME --zone Z                         copies the repository and installs it
#   launch/tpu_vm.sh train  NAME --zone Z -- --config configs/stage3.py:phi2 --workdir gs://... ...
#   launch/tpu_vm.sh delete NAME --zone Z
#
# With --dry-run before the first word the commands are printed and not run.
#
# Needs: the gcloud command line, signed in, with a project (gcloud config set project P) that has
# quota for the type; a disk or bucket that all workers see for --workdir, the model and the data
# (mounted with gcsfuse or Filestore at the same path on all of them).
# Costs to change: --type and --zone (`gcloud compute tpus accelerator-types list --zone Z`);
# --version is the runtime image. Which slice holds which model: `python -m medmoe_jax.plan`.
# All arguments behind -- go to `python -m medmoe_jax.train` as they are, on every worker; the workers
# find each other by themselves. `train` starts the run again, up to --restarts times, when the workers
# were told to save and end (status 75), as before maintenance and pre-emption.
set -euo pipefail

saved=75
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
usage() {
  sed -n '2,22p' "$0" >&2
  exit 2
}
[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2

zone="" type="" version="" spot=() restarts=10 arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --version) version=$2 && shift 2 ;;
    --restarts) restarts=$2 && shift 2 ;;
    --spot) spot=(--spot) && shift ;;
    --) shift && arguments=("$@") && break ;;
    *)
      echo "error: $1 is unknown" >&2
      usage
      ;;
  esac
done
if [ -z "$zone" ]; then
  echo "error: --zone is missing" >&2
  exit 2
fi
if [ -z "$version" ]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=v2-alpha-tpuv5-lite ;;
  esac
fi

run() {
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu=(gcloud compute tpus tpu-vm)

needs_type() {
  if [ -z "$type" ]; then
    echo "error: --type is missing, as in --type v5litepod-8" >&2
    exit 2
  fi
}

case $action in
  create)
    needs_type
    run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" \
      "${spot[@]}"
    ;;
  queue)
    needs_type
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    run "${tpu[@]}" scp "$archive" "$name:medmoe_jax.tar.gz" --zone="$zone" --worker=all
    run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="set -e
      mkdir -p medmoe_jax && tar -xzf medmoe_jax.tar.gz -C medmoe_jax && cd medmoe_jax
      python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    ;;
  train)
    if [ ${#arguments[@]} -eq 0 ]; then
      echo "error: put the arguments of medmoe_jax.train behind --" >&2
      exit 2
    fi
    remote="cd medmoe_jax && .venv/bin/python -m medmoe_jax.train$(printf ' %q' "${arguments[@]}")"
    for ((attempt = 0; attempt <= restarts; attempt++)); do
      status=0
      run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$remote" || status=$?
      if [ "$status" -ne "$saved" ]; then
        exit "$status"
      fi
      echo "saved; starting again"
    done
    exit "$saved"
    ;;
  delete)
    run "${tpu[@]}" delete "$name" --zone="$zone" --quiet
    ;;
  *)
    echo "error: $action is unknown; use create, queue, setup, train or delete" >&2
    usage
    ;;
esac
