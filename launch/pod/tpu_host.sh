#!/usr/bin/env bash
# Installs the project on one host of a TPU VM slice, and starts launch.train as a service. The script tpu_vm.sh, which
# launch.plan writes, calls it on every host.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

user="$(id -un)"
service="cm3leon-train@$user"
if systemctl is-active --quiet "$service"; then
  fail "$(hostname) is already training: run 'bash tpu_vm.sh stop' first."
fi
bash "$root/launch/pod/setup.sh" tpu,data,monitoring

{
  printf '#!/usr/bin/env bash\ncd %q\nexec %q -m launch.train --distributed' "$root" "$python"
  printf ' %q' "$@"
  echo
} >"$root/train.sh"
# Only root may read the secrets; systemd passes them to the service.
if [ -s "$root/secrets.env" ]; then
  sudo install -D --mode=600 "$root/secrets.env" "/etc/cm3leon-train/$user.env"
fi
rm -f "$root/secrets.env"
sed -e "s/^TimeoutStopSec=.*/TimeoutStopSec=${GRACE_SECONDS:-900}/" -e "s/^StartLimitBurst=.*/StartLimitBurst=${MAX_RESTARTS:-20}/" \
  "$root/launch/pod/cm3leon-train@.service" | sudo tee /etc/systemd/system/cm3leon-train@.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl reset-failed "$service" 2>/dev/null || true # Resets the count of restarts.
sudo systemctl enable --now "$service"
