#!/usr/bin/env bash
# Runs the instruction-tuning demo: tunes the bundled model on scene tasks, grades it before and after, writes report.html.
#   bash launch/demo_instructions.sh [--workdir DIR] [--minutes N]
# The script can run again at any time: it keeps finished stages, and another --minutes continues the training.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

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
config_file="examples/scenes/instruct.py:$minutes"
[ -f workdir/scene_instructions/tasks.yaml ] || "$python" -m examples.scenes.make_instructions workdir/scene_instructions
"$python" -m launch.run --config="$config_file" --workdir="$workdir" --init_from=scenes
"$python" -m examples.scenes.grade --config="$config_file" --workdir="$workdir" --records="$records"
"$python" -m launch.report --config="$config_file" --workdir="$workdir"
printf 'The demo took %d min %d s, installation included.\n' $((SECONDS / 60)) $((SECONDS % 60))
