# Sourced by demo.sh, test.sh and pod/. `make_venv EXTRA` creates .venv and installs the project; `$python` is its Python.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

fail() {
  echo "error: $*" >&2
  exit 2
}

runs_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    runs_new_enough "$PYTHON" || fail "PYTHON is '$PYTHON'; it must be an interpreter of Python 3.11 or newer."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if runs_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer was found: install it, or name its path, as in PYTHON=/path/to/python3.11 bash $0."
}

# Installs Python 3.11 by uv if no Python is new enough: Ubuntu 22.04, which most TPU VMs have, has 3.10.
get_python() {
  if [ -n "${PYTHON:-}" ] || runs_new_enough "$python" || (find_python) >/dev/null 2>&1; then return; fi
  echo "No Python 3.11 or newer was found; uv installs one."
  if ! { python3 -m pip install --user --quiet uv && python3 -m uv python install 3.11 && PYTHON="$(python3 -m uv python find 3.11)"; }; then
    fail "uv could not install Python 3.11: see its message above, or name a newer Python, as in PYTHON=/path/to/python3.11 bash $0."
  fi
  export PYTHON
}

fingerprint() {
  (cd "$root" && "$python" -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
    pyproject.toml requirements.txt constraints.txt)
}

# make_venv EXTRA: creates .venv if it is missing, and installs the project if pyproject.toml or the tested versions have
# changed since the last installation. With LOCK, such as requirements.lock, it installs all packages of that file, by their hashes.
make_venv() {
  local extra=$1 stamp="$venv/installed-$1" base start=$SECONDS
  if ! runs_new_enough "$python"; then
    base="$(find_python)"
    "$base" -m venv --clear "$venv" || fail "'$base -m venv' failed: install Python's venv and pip (on Debian: apt-get install python3-venv)."
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ]; then
    echo "Installing cm3leon_jax[$extra] into $venv; this takes a minute or two, the first time only."
    local pip=("$python" -m pip install --quiet --disable-pip-version-check) source=(-e ".[$extra]" -c constraints.txt)
    if [ -n "${LOCK:-}" ]; then
      (cd "$root" && "${pip[@]}" --require-hashes -r "$LOCK") || fail "pip could not install $LOCK into $venv: see its message above."
      source=(-e . --no-deps --no-build-isolation)
    fi
    (cd "$root" && "${pip[@]}" "${source[@]}") \
      || fail "pip could not install cm3leon_jax[$extra] into $venv: see its message above."
    fingerprint >"$stamp"
    echo "Installed in $((SECONDS - start)) s."
  fi
}
