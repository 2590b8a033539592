#!/bin/bash
# Pretrain on a Cloud TPU slice: the same command on every host of the slice.
#
#   launch/tpu_vm.sh NAME ZONE --config pretrain:size=base --config.data.root=gs://BUCKET/oxe \
#     --config.workdir=gs://BUCKET/runs/base
#
# Expects the repository in ~/octolike on the hosts, installed by `make .venv/ready EXTRA=tpu`. jax
# finds the hosts of a slice by itself. After a preemption of a queued resource, run it again.
set -euo pipefail
name="${1:?name of the TPU}" zone="${2:?its zone}"
shift 2
arguments=${*@Q}
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd octolike && .venv/bin/octolike train $arguments --config.train.distributed=True"
