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
"$python" -m pytest -n logical --maxprocesses=8 --dist=loadfile "$@"
