#!/usr/bin/env bash
# Tries this machine's GPU or TPU in about 30 minutes, and writes a page and a file to send.
#   bash launch/first_run.sh [--out=DIR] [--minutes=N]
# Without an accelerator, the CPU is the device, with small sizes: a rehearsal.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

CUDA13_DRIVER=580 # The first driver for CUDA 13; the first for CUDA 12 is 525.

# Prints the extra that installs JAX for this machine.
device() {
  local driver
  if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
    echo tpu
  elif driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)" && [ -n "$driver" ]; then
    driver="${driver%%.*}"
    if [ "$driver" -ge "$CUDA13_DRIVER" ]; then echo cuda13; else echo cuda12; fi
  else
    echo cpu
  fi
}

found="$(device)"
echo "first run: the device is $found."
case "$found" in
  tpu) make_venv demo,test,tpu ;;
  cuda12) make_venv demo,test,cuda12 ;;
  cuda13) make_venv demo,test,cuda13 ;;
  cpu)
    make_venv demo,test
    export JAX_PLATFORMS=cpu
    ;;
esac
cd "$root"
exec "$python" -m benchmarks.first_run "$@"
