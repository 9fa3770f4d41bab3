#!/usr/bin/env bash
# Runs on every host of a TPU VM slice, called by tpu_vm.sh: installs the project and starts launch.train as a service.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

user="$(id -un)"
service="cm3leon-train@$user"
if systemctl is-active --quiet "$service"; then
  fail "$(hostname) is already training: run 'bash launch/pod/tpu_vm.sh stop' first."
fi
# The runtimes of Ubuntu 22.04 have Python 3.10, which is too old.
if ! (find_python) >/dev/null 2>&1; then
  python3 -m pip install --user --quiet uv
  python3 -m uv python install 3.11
  PYTHON="$(python3 -m uv python find 3.11)"
  export PYTHON
fi
make_venv tpu,data,monitoring

{
  printf '#!/usr/bin/env bash\ncd %q\nexec %q -m launch.train --distributed' "$root" "$python"
  printf ' %q' "$@"
  echo
} >"$root/train.sh"
sudo cp "$root/launch/pod/cm3leon-train@.service" /etc/systemd/system/
sudo systemctl daemon-reload
sudo systemctl reset-failed "$service" 2>/dev/null || true # Resets the count of restarts.
sudo systemctl enable --now "$service"
