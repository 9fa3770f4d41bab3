#!/usr/bin/env bash
# Installs the project on a cloud host, where Python may be too old:
#   bash launch/pod/setup.sh EXTRAS
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

get_python
make_venv "$1"
