#!/usr/bin/env bash
# The demo: makes .venv, runs every stage on composed scenes or on OpenMoji, and writes report.html.
#   bash launch/demo.sh [--config scenes|openmoji] [--workdir DIR] [--minutes N]
# It can be run again at any time: finished stages are kept, and another --minutes continues the training.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# The train step of this small decoder takes 20 to 25% less time if malloc asks Linux for huge pages; other systems ignore this.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

usage="usage: bash launch/demo.sh [--config scenes|openmoji] [--workdir DIR] [--minutes N]"
config=scenes
workdir=""
minutes=15

while [ $# -gt 0 ]; do
  case "$1" in
    --config | --workdir | --minutes)
      [ -n "${2:-}" ] || fail "$1 needs a value; $usage"
      declare "${1#--}=$2"
      shift 2
      ;;
    --config=* | --workdir=* | --minutes=*)
      [ -n "${1#*=}" ] || fail "${1%%=*} needs a value; $usage"
      name="${1%%=*}"
      declare "${name#--}=${1#*=}"
      shift
      ;;
    -h | --help)
      echo "$usage"
      echo "  --config NAME  scenes: small scenes of colored icons, graded exactly; openmoji: the drawings of OpenMoji (default: $config)."
      echo "  --workdir DIR  folder of the run (default: $root/workdir/NAME); an existing run continues."
      echo "  --minutes N    time of the whole demo on two CPU cores (default: $minutes); scales only the training, and keeps finished stages."
      exit 0
      ;;
    *) fail "unexpected argument '$1'; $usage" ;;
  esac
done
case "$config" in
  scenes)
    pairs="scenes of colored icons, drawn and captioned"
    evaluation="bits of held-out documents, samples judged"
    ;;
  openmoji)
    pairs="OpenMoji, rendered and captioned"
    evaluation="bits of held-out documents"
    ;;
  *) fail "--config is '$config'; it must be scenes or openmoji; $usage" ;;
esac
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes is '$minutes'; it must be a positive whole number; $usage"
workdir="${workdir:-$root/workdir/$config}"
mkdir -p "$workdir" 2>/dev/null || fail "--workdir '$workdir' cannot be created: name a writable folder."
workdir="$(cd "$workdir" && pwd)"

make_venv demo
cd "$root"
config_file="ml_configs/$config.py:$minutes"
stages=10
number=0

run() {
  "$python" -m "launch.$1" --config="$config_file" --workdir="$workdir"
}

# stage TITLE COMMAND [FUNCTION]: prints the line of the stage, runs its command (or FUNCTION), prints its time.
stage() {
  local title=$1 command=$2 start=$SECONDS
  number=$((number + 1))
  printf '\n[%d/%d] %s (launch.%s)\n' "$number" "$stages" "$title" "$command"
  "${3:-run}" "$command"
  printf '[%d/%d] %s: %d s\n' "$number" "$stages" "$title" $((SECONDS - start))
}

# Prints the last step that the trainer has logged; 0 before the first.
logged_step() {
  local log="$workdir/train/metrics/metrics.jsonl" step=""
  if [ -f "$log" ]; then
    step="$(tail -n 20 "$log" | sed -n 's/.*"step": *\([0-9][0-9]*\).*/\1/p' | tail -n 1)"
  fi
  echo "${step:-0}"
}

# Prints the step of the newest whole checkpoint; 0 before the first.
saved_step() {
  local newest=0 file step
  for file in "$workdir"/train/checkpoints.digests/*.json; do
    step="$(basename "$file" .json)"
    [[ $step =~ ^[0-9]+$ ]] && [ "$step" -gt "$newest" ] && newest=$step
  done
  echo "$newest"
}

total_steps() {
  "$python" -c 'import sys; from cm3leon_jax.commands import config_file; print(config_file.load(sys.argv[1]).train.steps)' "$config_file"
}

# Trains in two runs. The first is killed without warning, some steps after a checkpoint in the middle of the remaining
# steps. The second continues from that checkpoint and repeats these steps, with the same losses bit for bit.
train_with_restart() {
  local total first half saved status=0
  total="$(total_steps)"
  first="$(logged_step)"
  if [ $((total - first)) -lt 10 ]; then
    run train
    return
  fi
  half=$((first + (total - first) / 2))
  (exec "$python" -m launch.train --config="$config_file" --workdir="$workdir") & # exec: signals reach the trainer itself.
  trainer=$!
  trap 'kill -TERM "$trainer" 2>/dev/null || true; wait "$trainer" || true; exit 130' INT TERM
  while kill -0 "$trainer" 2>/dev/null; do
    saved="$(saved_step)"
    if [ "$saved" -ge "$half" ] && [ "$(logged_step)" -ge $((saved + 3)) ]; then
      echo "demo: kills the trainer once, to show that it continues."
      kill -KILL "$trainer" 2>/dev/null || true
      break
    fi
    sleep 0.5
  done
  wait "$trainer" 2>/dev/null || status=$?
  trap - INT TERM
  case "$status" in
    0) return ;; # It finished before the kill.
    137) run train ;;
    *) exit "$status" ;;
  esac
  check_log || fail "$workdir/train/metrics/metrics.jsonl: the training did not continue exactly from its checkpoint."
}

check_log() {
  "$python" -c '
import sys
from cm3leon_jax.reports import summary
from cm3leon_jax.io import read_json_lines
log = summary.training(read_json_lines(sys.argv[1]))
last = log["restarts"][-1]
print("demo: killed after checkpoint {after_step}; {identical} of {replayed} repeated steps have the same loss, bit for bit.".format(**last))
sys.exit(not (log["every_step_logged_once"] and last["identical"] == last["replayed"]))
' "$workdir/train/metrics/metrics.jsonl"
}

stage "Raw pairs: $pairs" prepare_data
stage "Text tokenizer: byte-level BPE" train_text_tokenizer
stage "Image tokenizer: VQGAN" train_vqgan
stage "Documents: images to codes, text to ids" encode_documents
stage "CLIP" train_clip
stage "Neighbors of every document" build_neighbors
stage "Decoder: retrieval-augmented CM3 training" train train_with_restart
stage "Images for held-out captions" generate
stage "Evaluation: $evaluation" evaluate
stage "Export to the Hugging Face layout" export

echo
run report
printf 'The demo took %d min %d s, installation included.\n' $((SECONDS / 60)) $((SECONDS % 60))
