"""Imports published weights, draws four pictures, and prints digests: a part of the first run.

  python -m benchmarks.first_run_weights SOURCE OUT [FLAGS OF A CONFIG]

SOURCE is a folder of Anole or Chameleon (docs/weights.md). Keeps the import in OUT/weights, and
writes the pictures to OUT/weights.png.
"""

import hashlib
import json
import pathlib
import subprocess
import sys

PROMPT = "a red house by a lake"


def _run(command: str, *arguments: str) -> None:
  subprocess.run([sys.executable, "-m", "cm3leon_jax", command, *arguments], check=True)


def main(source: str, out: str, *fields: str) -> None:
  work = pathlib.Path(out) / "weights"
  _run(
    "import_weights",
    "--config=chameleon_7b",
    *fields,
    f"--source={pathlib.Path(source).absolute()}",
    f"--workdir={work}",
  )
  _run("generate", f"--workdir={work}", f"--prompt={PROMPT}", "--samples=4")
  [sheet] = work.glob("prompts/*/contact_sheet.png")
  (pathlib.Path(out) / "weights.png").write_bytes(sheet.read_bytes())
  for path in sorted(sheet.parent.glob("*.png")):
    print(f"SHA-256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}")
  done = json.loads((work / "init" / "done.json").read_text("utf-8"))
  print(f"SHA-256 of the source, first digits: {done['config']['source']}")


if __name__ == "__main__":
  main(*sys.argv[1:])
