#!/usr/bin/env bash
# One phase of training on a Cloud TPU slice that is asked for, set up, used and deleted from here.
#
#   launch/tpu_vm.sh create NAME --zone Z --type v5litepod-8               a slice at once
#   launch/tpu_vm.sh queue  NAME --zone Z --type v5litepod-16 [--spot]     a queued resource; waits for it
#   launch/tpu_vm.sh setup  NAME --zone Z [--mount COMMAND]                copies the last commit, installs it
#   launch/tpu_vm.sh train  NAME --zone Z -- --config configs/stage3.py:phi2 --workdir data/runs/stage3 ...
#   launch/tpu_vm.sh delete NAME --zone Z                 a slice that was created
#   launch/tpu_vm.sh unqueue NAME --zone Z                a slice that was queued, and its request
#
# With --dry-run before the first word the commands are printed and not run.
#
# Needs: the gcloud command line, signed in, with a project (gcloud config set project P) that has
# quota for the type; for slices of several hosts a key in the agent (ssh-add ~/.ssh/google_compute_engine);
# a disk or bucket that all workers see at the same path for --workdir, the model and the data:
# --mount is a command that `setup` runs on every worker, in the folder that `train` runs in, as
# "mkdir -p data && gcsfuse BUCKET data".
# Costs to change: --type and --zone (`gcloud compute tpus accelerator-types list --zone Z`);
# --version is the runtime image. Which slice holds which model: `python -m medmoe_jax.plan`. Another
# version of the code: commit it and run `setup` again.
# All arguments behind -- go to `python -m medmoe_jax.train` as they are, on every worker; the workers
# find each other by themselves. A slice costs money until it is deleted, also when nothing runs on it.
#
# `train` starts the run again, up to --restarts (10) times, when the workers were told to save and
# end (status 75), as before maintenance, or one of them was lost (69). A spot slice that was taken
# away is gone: given --type, --spot and --mount as `queue` and `setup` were, `train` queues it anew,
# waits, sets it up, and the run goes on from its last checkpoint. Ctrl-C ends `train` and leaves the
# run on the slice going; what has it save and end:
#   gcloud compute tpus tpu-vm ssh NAME --zone Z --worker=all --command="pkill -TERM -f medmoe_jax.train"
set -euo pipefail

saved=75 # exit status of a run that saved and wants to be started again
lost=69  # of a process that has lost another one
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
usage() {
  sed -n '2,33p' "$0" >&2
  exit 2
}
[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2

zone="" type="" version="" spot=() mount="" restarts=10 poll=30 arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --version) version=$2 && shift 2 ;;
    --mount) mount=$2 && shift 2 ;;
    --restarts) restarts=$2 && shift 2 ;;
    --poll) poll=$2 && shift 2 ;; # seconds between two looks at the queue
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
    v2-* | v3-* | v4-*) version='tpu-ubuntu2204-base' ;;
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
queue=(gcloud compute tpus queued-resources)

needs_type() {
  if [ -z "$type" ]; then
    echo "error: --type is missing, as in --type v5litepod-8" >&2
    exit 2
  fi
}

enqueue() { # and waits, which can take minutes or days
  run "${queue[@]}" create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
    --runtime-version="$version" "${spot[@]}"
  local state=""
  until [ "$state" = ACTIVE ]; do
    run "${queue[@]}" describe "$name" --zone="$zone" --format="value(state.state)" >"$scratch"
    if [ "$dry_run" = yes ]; then
      cat "$scratch"
      return
    fi
    state=$(<"$scratch")
    case $state in
      FAILED | SUSPENDED)
        echo "error: $name is $state; the reason: ${queue[*]} describe $name --zone=$zone" >&2
        exit 1
        ;;
      ACTIVE) ;;
      *)
        echo "$name: $state"
        sleep "$poll"
        ;;
    esac
  done
}

unqueue() {
  run "${queue[@]}" delete "$name" --zone="$zone" --force --quiet
}

setup() { # the images' own Python is too old
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$scratch" HEAD
  run "${tpu[@]}" scp "$scratch" "$name:medmoe_jax.tar.gz" --zone="$zone" --worker=all
  run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="set -e
      export PATH=\$HOME/.local/bin:\$PATH
      command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
      mkdir -p medmoe_jax && tar -xzf medmoe_jax.tar.gz -C medmoe_jax && cd medmoe_jax
      [ -d .venv ] || uv venv -q --python 3.12 .venv
      uv pip install -q -e '.[eval,medical,tpu]'"
  if [ -n "$mount" ]; then
    run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="cd medmoe_jax && $mount"
  fi
}

taken_away() { # whether a spot slice was; not where nobody can be asked
  local state
  state=$("${tpu[@]}" describe "$name" --zone="$zone" --format="value(state)") || return 1
  [ "$state" = PREEMPTED ] || [ "$state" = TERMINATED ]
}

scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
case $action in
  create)
    needs_type
    run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" \
      "${spot[@]}"
    ;;
  queue)
    needs_type
    enqueue
    ;;
  setup) setup ;;
  train)
    if [ ${#arguments[@]} -eq 0 ]; then
      echo "error: put the arguments of medmoe_jax.train behind --" >&2
      exit 2
    fi
    remote="cd medmoe_jax && .venv/bin/python -m medmoe_jax.train$(printf ' %q' "${arguments[@]}")"
    for ((attempt = 0; attempt <= restarts; attempt++)); do
      status=0
      run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$remote" || status=$?
      if [ "$status" -eq 0 ]; then
        exit 0
      elif taken_away; then
        if [ -z "$type" ]; then
          echo "error: $name was taken away. Queue it anew, run setup and train again; or give" \
            "train --type (and --spot), and it does so itself" >&2
          exit "$status"
        fi
        echo "$name was taken away; asking for it again"
        unqueue
        enqueue
        setup
      elif [ "$status" -eq "$saved" ] || [ "$status" -eq "$lost" ]; then
        echo "starting again; the run goes on from its last checkpoint"
      else
        exit "$status"
      fi
    done
    exit "$saved"
    ;;
  delete)
    run "${tpu[@]}" delete "$name" --zone="$zone" --quiet
    ;;
  unqueue) unqueue ;;
  *)
    echo "error: $action is unknown; use create, queue, setup, train, delete or unqueue" >&2
    usage
    ;;
esac
