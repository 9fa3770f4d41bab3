#!/usr/bin/env bash
# Tries this machine's GPU or TPU in about 30 minutes, and writes a page and a file to send.
#   bash launch/first_run.sh [--out=DIR] [--minutes=N]
# Without an accelerator, the CPU is the device, with small sizes: a rehearsal.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

CUDA12_DRIVER=525 CUDA13_DRIVER=580 # The first drivers for CUDA 12 and 13.

# Prints the extra that installs JAX for this machine. Looks for NVIDIA's driver first, because files in /dev/vfio are not
# always TPUs: a host that passes devices to virtual machines also has some.
device() {
  local driver
  if driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)" && [ -n "$driver" ]; then
    driver="${driver%%.*}"
    [ "$driver" -ge "$CUDA12_DRIVER" ] || fail "the NVIDIA driver is $driver; JAX needs $CUDA12_DRIVER or newer: update the driver."
    if [ "$driver" -ge "$CUDA13_DRIVER" ]; then echo cuda13; else echo cuda12; fi
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
    echo tpu
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
