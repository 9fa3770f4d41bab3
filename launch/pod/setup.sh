#!/usr/bin/env bash
# Installs the project on a cloud host, where Python may be too old (Ubuntu 22.04 has 3.10):
#   bash launch/pod/setup.sh EXTRAS
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

if ! (find_python) >/dev/null 2>&1; then
  python3 -m pip install --user --quiet uv
  python3 -m uv python install 3.11
  PYTHON="$(python3 -m uv python find 3.11)"
  export PYTHON
fi
make_venv "$1"
