#!/usr/bin/env bash
# Runs the demo: creates .venv, runs every stage on composed scenes, and writes report.html.
#   bash launch/demo.sh [--workdir DIR] [--minutes N]
# The script can run again at any time: it keeps finished stages, and another --minutes continues the training.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage="usage: bash launch/demo.sh [--workdir DIR] [--minutes N]"
workdir=""
minutes=15

while [ $# -gt 0 ]; do
  case "$1" in
    --workdir | --minutes)
      [ -n "${2:-}" ] || fail "$1 needs a value; $usage"
      declare "${1#--}=$2"
      shift 2
      ;;
    --workdir=* | --minutes=*)
      [ -n "${1#*=}" ] || fail "${1%%=*} needs a value; $usage"
      name="${1%%=*}"
      declare "${name#--}=${1#*=}"
      shift
      ;;
    -h | --help)
      echo "$usage"
      echo "  --workdir DIR  folder of the run (default: $root/workdir/scenes); an existing run continues."
      echo "  --minutes N    time of the whole demo after the installation (default: $minutes); it trains as many steps as fit."
      exit 0
      ;;
    *) fail "unexpected argument '$1'; $usage" ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes is '$minutes'; it must be a positive whole number; $usage"
workdir="${workdir:-$root/workdir/scenes}"
mkdir -p "$workdir" 2>/dev/null || fail "--workdir '$workdir' cannot be created: name a writable folder."
workdir="$(cd "$workdir" && pwd)"

make_venv demo
installed=$SECONDS
cd "$root"
config_file="examples/scenes/config.py:$minutes"

command=(-m launch.run --config="$config_file" --config.train.minutes="$minutes" --workdir="$workdir")

run() {
  "$python" "${command[@]}"
}

# Prints the last step that the trainer has logged; 0 if there is none.
logged_step() {
  local log="$workdir/train/metrics/metrics.jsonl" step=""
  if [ -f "$log" ]; then
    step="$(tail -n 20 "$log" | sed -n 's/.*"step": *\([0-9][0-9]*\).*/\1/p' | tail -n 1)"
  fi
  echo "${step:-0}"
}

# Prints the step of the newest complete checkpoint; 0 if there is none.
saved_step() {
  local newest=0 file step
  for file in "$workdir"/train/checkpoints.digests/*.json; do
    step="$(basename "$file" .json)"
    [[ $step =~ ^[0-9]+$ ]] && [ "$step" -gt "$newest" ] && newest=$step
  done
  echo "$newest"
}

# Runs all stages, and kills the trainer once, a few steps after its first checkpoint. The next run continues from that
# checkpoint and repeats these few steps with bit-identical losses.
run_with_restart() {
  local first saved status=0
  first="$(saved_step)"
  (exec "$python" "${command[@]}") & # With exec, signals reach the run and not a subshell.
  runner=$!
  trap 'kill -TERM "$runner" 2>/dev/null || true; wait "$runner" || true; exit 130' INT TERM
  while kill -0 "$runner" 2>/dev/null; do
    saved="$(saved_step)"
    if [ "$saved" -gt "$first" ] && [ "$(logged_step)" -ge $((saved + 3)) ]; then
      echo "demo: killing the trainer once, to show that the run continues."
      kill -KILL "$(trainer)" 2>/dev/null || true
      break
    fi
    sleep 0.5
  done
  wait "$runner" || status=$?
  trap - INT TERM
  case "$status" in
    0) return ;; # The training finished before the kill.
    137) run ;;
    *) exit "$status" ;;
  esac
  check_log || fail "$workdir/train/metrics/metrics.jsonl: the training did not continue exactly from its checkpoint."
}

# Prints the PID of the process that holds the lease of the training.
trainer() {
  "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["pid"])' "$workdir/train/lease.json"
}

check_log() {
  "$python" -c '
import sys
from cm3leon_jax.reports import summary
from cm3leon_jax.files.json_files import read_json_lines
log = summary.training(read_json_lines(sys.argv[1]))
last = log["restarts"][-1]
print("demo: killed after checkpoint {after_step}; {identical} of {replayed} repeated steps have bit-identical losses.".format(**last))
sys.exit(not (log["every_step_logged_once"] and last["identical"] == last["replayed"]))
' "$workdir/train/metrics/metrics.jsonl"
}

run_with_restart
# The figures of the demo come first in the report.
"$python" -m examples.scenes.evaluate --config="$config_file" --workdir="$workdir"
"$python" -m launch.report --config="$config_file" --workdir="$workdir"
took=$((SECONDS - installed))
printf 'The demo took %d min %d s after the installation.\n' $((took / 60)) $((took % 60))
