#!/bin/bash
# Pretrain on plain machines with ssh: one process per machine, which uses all of its GPUs.
#
#   launch/machines.sh host0,user@host1 --config pretrain:size=base --config.data.root=/data/oxe
#
# The repository, its .venv and the data lie at the same path on every machine. No torchrun: jax
# needs three variables. The first host writes the run; its output comes first.
set -euo pipefail
IFS=, read -ra hosts <<<"${1:?host0,host1,...}"
shift
port="${PORT:-12355}"
arguments=${*@Q}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for i in "${!hosts[@]}"; do
  # -tt: a signal here ends the remote process with SIGHUP; the run then resumes from its last
  # checkpoint. `exec`, so that the process itself gets it.
  ssh -tt -o BatchMode=yes "${hosts[$i]}" "cd $(printf '%q' "$PWD") && \
    JAX_COORDINATOR_ADDRESS=${hosts[0]##*@}:$port JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$i \
    exec .venv/bin/octolike train $arguments --config.train.distributed=True" </dev/null &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
