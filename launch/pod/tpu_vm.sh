#!/usr/bin/env bash
# Trains on the hosts of one TPU VM slice. Guide: docs/pods.md
#   export PROJECT=my-project ZONE=us-west4-a TPU=my-pod
#   bash launch/pod/tpu_vm.sh run --config=ml_configs/cm3leon_7b.py --workdir=gs://my-bucket/7b \
#     --config.mesh.fsdp=16 --config.mesh.fsdp_inner=16
set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: bash launch/pod/tpu_vm.sh create|run|status|logs|stop|delete"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

help() {
  cat <<'EOF'
usage: bash launch/pod/tpu_vm.sh COMMAND, with PROJECT, ZONE and TPU (the slice's name) in the environment
  create [FLAGS]  creates the slice; needs ACCELERATOR (v5litepod-256) and RUNTIME (v2-alpha-tpuv5-lite); FLAGS go to gcloud
  run FLAGS       copies this source, installs it and starts or continues launch.train with FLAGS, on all hosts
  status          prints the state of the service on every host
  logs [WORKER]   follows the output of one host (default: the first)
  stop            stops training on all hosts, which save first
  delete          deletes the slice
EOF
}

tpu() {
  local action=$1
  shift
  gcloud compute tpus tpu-vm "$action" "$@" --project="$PROJECT" --zone="$ZONE"
}

on_hosts() {
  tpu ssh "$TPU" --worker="$1" --command="$2"
}

# On every host bash receives one string and splits it: %q keeps the flags whole.
run() {
  check_flags "$@"
  local archive start
  archive="$(mktemp -d)/cm3leon_jax.tar.gz"
  # shellcheck disable=SC2064 # Expanded now, not at exit.
  trap "rm -r '$(dirname "$archive")'" EXIT
  tar -C "$root" --exclude=__pycache__ -czf "$archive" cm3leon_jax launch ml_configs pyproject.toml requirements.txt
  tpu scp "$archive" "$TPU:" --worker=all
  start="$(printf ' %q' "$@")"
  on_hosts all "mkdir -p cm3leon_jax && cd cm3leon_jax && rm -rf cm3leon_jax launch ml_configs && tar -xzf ../cm3leon_jax.tar.gz && bash launch/pod/tpu_host.sh$start"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
  -h | --help)
    help
    exit 0
    ;;
  create | run | status | logs | stop | delete) ;;
  "") fail "no command; $usage" ;;
  *) fail "unexpected command '$command'; $usage" ;;
esac
require PROJECT my-project
require ZONE us-west4-a
require TPU my-pod
# shellcheck disable=SC2016 # $USER expands on the host.
service='cm3leon-train@$USER'
case "$command" in
  create)
    require ACCELERATOR v5litepod-256
    require RUNTIME v2-alpha-tpuv5-lite
    tpu create "$TPU" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "$@"
    ;;
  run) run "$@" ;;
  status) on_hosts all "hostname; systemctl is-active $service || true" ;;
  logs) on_hosts "${1:-0}" "sudo journalctl --unit=$service --lines=100 --follow" ;;
  stop) on_hosts all "sudo systemctl disable --now $service" ;;
  delete) tpu delete "$TPU" ;;
esac
