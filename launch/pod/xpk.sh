#!/usr/bin/env bash
# Trains on a cluster of XPK: creates or continues the workload NAME. Guide: docs/pods.md
#   export PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster NAME=cm3leon-7b TPU_TYPE=v5litepod-256 IMAGE=...
#   bash launch/pod/xpk.sh --config=ml_configs/cm3leon_7b.py --workdir=gs://my-bucket/7b \
#     --config.mesh.fsdp=16 --config.mesh.fsdp_inner=16
# Optional: SLICES=1, MAX_RESTARTS=20, GRACE_SECONDS=900.
set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require PROJECT my-project
require ZONE us-west4-a
require CLUSTER my-cluster
require NAME cm3leon-7b
require TPU_TYPE v5litepod-256
require IMAGE us-docker.pkg.dev/my-project/my-repository/cm3leon:tpu-root
check_flags "$@"

# XPK gives --command to bash in the container: %q keeps the flags whole, and with exec SIGTERM reaches the trainer itself.
# XPK restarts on 42 and from 127 on. Python ends with 1 if another host is lost, and with 75 if it was asked to stop and saved.
xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts="${MAX_RESTARTS:-20}" --restart-on-exit-codes=1,75 \
  --termination-grace-period-seconds="${GRACE_SECONDS:-900}" \
  --command="exec python -m launch.train --distributed$(printf ' %q' "$@")"
