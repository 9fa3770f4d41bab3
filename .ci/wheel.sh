#!/usr/bin/env bash
# Installs the wheel into a clean environment and runs there what the README shows, in a folder outside the checkout.
#   bash .ci/wheel.sh [PYTHON]     (default: python3.13)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
base="${1:-python3.13}"

fail() {
  echo "error: $*" >&2
  exit 2
}

"$base" --version >/dev/null 2>&1 \
  || fail "'$base' does not run, and the wheel must be tried on it: install Python 3.13, or name another: bash .ci/wheel.sh PYTHON."

folder="$(mktemp -d)"
server=""
end() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
  rm -rf "$folder"
}
trap end EXIT

# The wheel is built from a copy, so that no earlier build is in it.
mkdir "$folder/source" "$folder/elsewhere"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create --file=-) \
  | tar --extract --directory="$folder/source"
"$base" -m venv "$folder/venv" || fail "'$base -m venv' failed: install its venv and pip (on Debian: apt-get install python3-venv)."
unset PYTHONPATH
# The commands below share programs, and each of them is a new process.
export JAX_COMPILATION_CACHE_DIR="$folder/programs" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
export PATH="$folder/venv/bin:$PATH"
pip=(python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" wheel --no-deps --wheel-dir="$folder" "$folder/source"
wheel="$(echo "$folder"/*.whl)"
"${pip[@]}" install "${wheel}[serve]" -c "$root/constraints.txt"
cd "$folder/elsewhere"
python -c 'import sys, jax, cm3leon_jax; print(f"wheel: Python {sys.version.split()[0]}, jax {jax.__version__}, {cm3leon_jax.__file__}")'

echo "wheel: the first snippet of README.md"
# The quickstart of a reader: the first block of Python.
awk '/^```python$/ {inside = 1; next} /^```$/ {if (inside) exit} inside' "$root/README.md" >snippet.py
grep -q 'CM3Leon.load' snippet.py || fail "README.md has no snippet that loads a model."
{ cat snippet.py; echo 'samples[0].image.save("sample.png")'; } >run.py
python run.py

cm3leon docs own_images | cmp - "$root/docs/own_images.md" || fail "the wheel has no documentation."

echo "wheel: cm3leon generate, a caption, cm3leon export"
cm3leon generate --workdir=scenes --prompt="a red bell" --out=drawn
[ -n "$(find drawn -name '*.png' -print -quit)" ] || fail "cm3leon generate wrote no image."
cm3leon generate --workdir=scenes-instruct --task=caption --image=sample.png --out=captioned | tee caption.txt
[ -s caption.txt ] || fail "cm3leon generate --task=caption printed nothing."

cm3leon export --workdir=scenes --output=exported
[ -f exported/README.md ] || fail "cm3leon export wrote no model card."

echo "wheel: cm3leon run on the bundled model"
python - <<'PYTHON'
import itertools, pathlib
from PIL import Image, ImageDraw

pathlib.Path("drawings").mkdir()
sides = {"top": 4, "bottom": 28}, {"left": 4, "right": 28}
colors = {"red": "#dc001e", "orange": "#ff8200", "yellow": "#fae600", "green": "#009632",
          "cyan": "#00bee1", "blue": "#0032e6", "purple": "#9600be", "black": "#000000"}
for color, shape, y, x in itertools.product(colors, ("rectangle", "ellipse"), *sides):
  image = Image.new("RGB", (48, 48), "white")
  corner = sides[0][y], sides[1][x]
  getattr(ImageDraw.Draw(image), shape)((*corner[::-1], corner[1] + 16, corner[0] + 16), colors[color])
  name = f"drawings/{color}_{shape}_{y}_{x}"
  image.save(f"{name}.png")
  pathlib.Path(f"{name}.txt").write_text(f"a {color} {shape} at the {y} {x}")
PYTHON
cm3leon run --config=own:5 --config.raw.source=drawings --config.train.steps=20 --init_from=scenes \
  --workdir=tuned | tee tuned.txt
grep -q '^  forgetting: .* bits per image code' tuned.txt || fail "cm3leon run measured no forgetting."
if cm3leon run --config=scenes --workdir=demo 2>demo.txt; then fail "cm3leon run --config=scenes ran without the examples."; fi
grep -q 'examples/scenes/config.py' demo.txt || fail "cm3leon run --config=scenes did not say where the demo is."

echo "wheel: cm3leon serve"
cm3leon serve --workdir=scenes --port=0 >serve.log 2>&1 &
server=$!
for _ in $(seq 600); do
  grep -q 'http://' serve.log && break
  kill -0 "$server" 2>/dev/null || break
  sleep 1
done
python - <<'PYTHON' || { cat serve.log && fail "cm3leon serve did not answer."; }
import base64, io, json, re, urllib.request
from PIL import Image

address = re.search(r"http://[\w.:]+", open("serve.log").read())[0].rstrip(".")
body = json.dumps({"prompt": "a green bell", "n": 1, "response_format": "b64_json"}).encode()
request = urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=300) as answer:
  image = Image.open(io.BytesIO(base64.b64decode(json.load(answer)["data"][0]["b64_json"])))
print(f"wheel: the server drew an image of {image.width} x {image.height} pixels.")
PYTHON
kill -TERM "$server"
wait "$server" || fail "cm3leon serve ended with exit code $?: $(tail -n 3 serve.log)"
server=""
