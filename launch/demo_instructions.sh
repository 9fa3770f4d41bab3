#!/usr/bin/env bash
# The demo of instruction tuning: tunes the bundled model on tasks over scenes, grades it before and after, and writes report.html.
#   bash launch/demo_instructions.sh [--workdir DIR] [--minutes N]
# It can be run again at any time: finished stages are kept, and another --minutes continues the training.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# The train step of this small decoder takes 20 to 25% less time if malloc asks Linux for huge pages; other systems ignore this.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

usage="usage: bash launch/demo_instructions.sh [--workdir DIR] [--minutes N]"
workdir="$root/workdir/scenes_instruct"
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
      echo "  --workdir DIR  folder of the run (default: $workdir); an existing run continues."
      echo "  --minutes N    time of the whole demo on two CPU cores (default: $minutes); scales only the training."
      exit 0
      ;;
    *) fail "unexpected argument '$1'; $usage" ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes is '$minutes'; it must be a positive whole number; $usage"
mkdir -p "$workdir" 2>/dev/null || fail "--workdir '$workdir' cannot be created: name a writable folder."
workdir="$(cd "$workdir" && pwd)"

make_venv demo
cd "$root"
records=100
[ "$minutes" -ge 5 ] || records=20
stages=8
number=0

# stage TITLE COMMAND [FLAGS]: prints the line of the stage, runs its command, prints its time.
stage() {
  local title=$1 command=$2 start=$SECONDS
  shift 2
  number=$((number + 1))
  printf '\n[%d/%d] %s (launch.%s)\n' "$number" "$stages" "$title" "$command"
  "$python" -m "launch.$command" --config="ml_configs/scenes_instruct.py:$minutes" --workdir="$workdir" "$@"
  printf '[%d/%d] %s: %d s\n' "$number" "$stages" "$title" $((SECONDS - start))
}

stage "Tokenizers and CLIP of the bundled model" copy_tokenizers --init_from=scenes
stage "Raw pairs, some of which are replayed: scenes, drawn and captioned" prepare_data
stage "Documents: images to codes, text to ids" encode_documents
stage "Neighbors of every document" build_neighbors
stage "Instructions: tasks over scenes" encode_instructions
stage "Tuning the decoder" train --init_from=scenes
stage "Grades: answers to held-out instructions, before and after" grade_instructions --records="$records"
stage "Report" report
printf 'The demo took %d min %d s, installation included.\n' $((SECONDS / 60)) $((SECONDS % 60))
