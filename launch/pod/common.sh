# Sourced by tpu_vm.sh, tpu_host.sh and xpk.sh.
# shellcheck shell=bash

fail() {
  echo "error: $*" >&2
  exit 2
}

# require NAME EXAMPLE: the environment variable NAME must be set.
require() {
  [ -n "${!1:-}" ] || fail "$1 is not set: export it, as in $1=$2."
}

# check_flags FLAGS: launch.train needs a --config, and a --workdir in a bucket, which all hosts reach.
check_flags() {
  local flag config="" workdir=""
  for flag in "$@"; do
    case "$flag" in
      --config=?*) config=$flag ;;
      --workdir=?*) workdir=$flag ;;
    esac
  done
  [ -n "$config" ] || fail "the flag --config=FILE is missing, as in --config=ml_configs/cm3leon_7b.py."
  [[ $workdir == --workdir=gs://?* ]] || fail "the flag --workdir=gs://BUCKET/FOLDER is missing: all hosts read and write one workdir."
}
