#!/usr/bin/env bash
# Runs ruff, mypy and the default tests:  bash launch/test.sh [PYTEST ARGUMENTS]
# Runs the slow tests, or some shards:    bash launch/test.sh --slow [SHARD ...]
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv demo,dev
# With this variable, each test process would compile the package and the tests again.
unset PYTHONDONTWRITEBYTECODE
cd "$root"

# Each shard takes at most 40 minutes on two cores.
shards=(launch planning benchmarks cards others)
slow() {
  local pytest=("$python" -m pytest -m slow -n logical --maxprocesses=8 --dist=loadgroup)
  case "$1" in
    launch | planning | benchmarks) "${pytest[@]}" "tests/$1" ;;
    cards) "$python" -m benchmarks.speed.cards --check ;;
    others) "${pytest[@]}" --ignore=tests/launch --ignore=tests/planning --ignore=tests/benchmarks ;;
    *) fail "the slow tests have no shard '$1': name one of ${shards[*]}." ;;
  esac
}

if [ "${1:-}" = --slow ]; then
  shift
  (($#)) || set -- "${shards[@]}"
  for shard in "$@"; do slow "$shard"; done
  exit
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$venv/bin/lint-imports" --no-cache --no-logo
"$python" -m mypy >"$venv/mypy.log" &
types=$!
# loadgroup runs all tests of a file in one process, which shares the fixtures. Without reordering, files of the same
# folder, which share compiled programs, run one after another.
"$python" -m pytest -n logical --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder "$@" || failed=$?
wait "$types" || failed=$?
cat "$venv/mypy.log"
exit "${failed:-0}"
