#!/usr/bin/env bash
# Runs lint, types and the default tests: bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv demo,dev
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file of tests stays in one process, for its fixtures.
pytest=("$python" -m pytest -n logical --maxprocesses=8 --dist=loadfile)
if (($#)); then exec "${pytest[@]}" "$@"; fi
# Linux allows a process 65,530 maps of memory. A compiled program takes several, so each sixth of the files has processes
# of its own.
mapfile -t files < <(find tests -name '*_test.py' | sort)
size=$(((${#files[@]} + 5) / 6)) status=0
for ((i = 0; i < ${#files[@]}; i += size)); do
  "${pytest[@]}" "${files[@]:i:size}" || status=$?
done
exit "$status"
