#!/usr/bin/env bash
# Prints sizes of the project beside those of a commit:  bash tools/size.sh [COMMIT]     (default: HEAD~1)
# Lines are those of Python files in the working tree and in COMMIT; the words of docs are without generated pages and the log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
before="${1:-HEAD~1}"
git rev-parse --quiet --verify "$before^{commit}" >/dev/null || { echo "size: there is no commit $before." && exit 0; }

old="$(mktemp -d)"
trap 'rm -rf "$old"' EXIT
git archive "$before" | tar --extract --directory="$old"

lines() { (cd "$1" && find "$2" -name '*.py' -print0 2>/dev/null | xargs -0 cat | wc -l); }
words() { (cd "$1" && find docs -maxdepth 1 -name '*.md' ! -name log.md ! -name config.md ! -name instruction_tasks.md -print0 | xargs -0 cat | wc -w); }
row() { printf 'size: %-24s %7s %+7d\n' "$1" "$3" "$(($3 - $2))"; }

for folder in cm3leon_jax tests benchmarks tools examples; do
  row "$folder, lines" "$(lines "$old" "$folder")" "$(lines . "$folder")"
done
row "docs, words" "$(words "$old")" "$(words .)"
