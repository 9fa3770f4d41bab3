#!/usr/bin/env bash
# Rehearses a pod job: runs launch.train as several processes on this machine, each with its own fake CPU devices.
#
#   bash launch/pod/local.sh 4 2 -- --config=CONFIG --workdir=workdir --config.mesh.fsdp=8
#
# runs 4 processes with 2 devices each (default: 1); the flags are those of launch.train, or of the command that
# COMMAND=launch.evaluate names. Every line of output begins with the number of its process. SIGTERM and Ctrl-C go to all
# processes, which save and stop. If one process fails, all end.
# Exit code: that of the first process that failed; 75 if the run was asked to stop and saved; 0 if it is done.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

usage="usage: bash launch/pod/local.sh PROCESSES [DEVICES] -- FLAGS of launch.train"
interrupted=75 # Exit code of launch.train after it was asked to stop and has saved.
grace=10       # Seconds for the others to end by themselves after one has failed.

positive() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2'; it must be a positive whole number; $usage"
}

if [ "${1:-}" = "--help" ]; then
  echo "$usage"
  exit
fi
processes=${1:-}
positive PROCESSES "$processes"
shift
devices=1
if [ "${1:-}" != "--" ]; then
  devices=${1:-}
  positive DEVICES "$devices"
  shift
fi
[ "${1:-}" = "--" ] || fail "'--' must stand before the flags, not '${1:-}'; $usage"
shift

if [ -n "${PYTHON:-}" ] || [ ! -x "$python" ]; then
  python="$(find_python)"
fi
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

# Prints each line after the number of its process, without the messages of JAX's CPU network about connections. Of a
# progress bar it prints only the last state.
prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    [[ $line == *"[Gloo] Rank"* || $line =~ ^[[:space:]0-9]*$ ]] && continue
    printf '[%s] %s\n' "$1" "${line##*$'\r'}"
  done
}

pids=()
to_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
}
trap 'to_all TERM' TERM INT
trap 'to_all KILL' EXIT

for ((i = 0; i < processes; i++)); do
  "$python" -m "${COMMAND:-launch.train}" --coordinator_address="localhost:$port" --num_processes="$processes" --process_id="$i" "$@" \
    > >(prefix "$i") 2>&1 &
  pids+=($!)
  echo "local.sh: process $i is PID $!"
done

status=0
running=$processes
failed_at=0
while [ "$running" -gt 0 ]; do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[$i]}" 2>/dev/null && continue
    code=0
    wait "${pids[$i]}" || code=$?
    unset "pids[$i]"
    running=$((running - 1))
    [ "$code" -eq 0 ] && continue
    if [ "$status" -eq 0 ] || [ "$status" -eq "$interrupted" ]; then
      status=$code
    fi
    if [ "$code" -ne "$interrupted" ] && [ "$failed_at" -eq 0 ]; then
      echo "local.sh: process $i ended with exit code $code." >&2
      failed_at=$SECONDS
    fi
  done
  if [ "$failed_at" -gt 0 ] && [ $((SECONDS - failed_at)) -ge "$grace" ]; then
    to_all KILL
  fi
  sleep 0.2
done
exit "$status"
