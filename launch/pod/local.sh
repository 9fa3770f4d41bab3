#!/usr/bin/env bash
# Simulates a pod job: runs launch.train as several processes on this machine, each with separate fake CPU devices.
#
#   bash launch/pod/local.sh 4 2 -- --config=CONFIG --workdir=workdir --config.mesh.fsdp=8
#
# runs 4 processes with 2 devices each (default: 1). The flags after -- are flags of launch.train. Another command runs if
# the variable COMMAND names it, for example COMMAND=launch.evaluate. Every line of output begins with the number of its
# process. SIGTERM and Ctrl-C go to all processes, which save and stop. If one process fails, all processes end.
# Exit code: the code of the first process that failed; 75 if the run saved and stopped on request; 0 if it finished.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

usage="usage: bash launch/pod/local.sh PROCESSES [DEVICES] -- FLAGS of launch.train"
interrupted=75 # Exit code of launch.train after it saved and stopped on request.
grace=10       # Seconds after the first failure until the other processes are killed.

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

# Prefixes each line with the number of its process. Removes Gloo's connection messages (the network of JAX on CPUs), and
# all but the last state of a progress bar.
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
