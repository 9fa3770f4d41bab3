#!/usr/bin/env bash
# Tries this machine's GPU or TPU in about 30 minutes, and writes a page and a file to send.
#   bash launch/first_run.sh [--out=DIR or gs://BUCKET/FOLDER] [--minutes=N]
# The same command continues a run that was stopped.
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

# Prints the hosts of a TPU slice, separated by commas. The metadata server of a TPU VM knows them; elsewhere there is none.
hosts() {
  local server="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes"
  echo "${TPU_WORKER_HOSTNAMES:-$(curl --silent --fail --max-time 5 --header "Metadata-Flavor: Google" "$server/worker-network-endpoints")}"
}

found="$(device)"
echo "first run: the device is $found."
if [ "$found" = tpu ] && [[ "$(hosts)" == *,* ]]; then # JAX would wait for the other hosts.
  fail "this host is one of several of a TPU slice, and the first run uses one: take a slice of one host, such as v5litepod-8. docs/pods.md is about slices."
fi
get_python
[[ "$*" == *gs://* ]] && extra=,data || extra=
case "$found" in
  cpu)
    make_venv "demo,test$extra"
    export JAX_PLATFORMS=cpu
    ;;
  *) make_venv "demo,test,$found$extra" ;;
esac
cd "$root"
exec "$python" -m benchmarks.first_run "$@"
