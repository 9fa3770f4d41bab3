"""Draws the examples of README's section "Try" with its own commands, and judges each image.

  PYTHONPATH=$PWD python .ci/readme.py

Examples are lines `cm3leon generate ...` and Python blocks, whose images are `samples`. If one says
"retrieves", or reads `.neighbors`, all its prompts must find a document.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

from examples.scenes.judge.clauses import parse
from examples.scenes.judge.judge import judge


def examples(readme: str) -> list[str]:
  """Returns the commands `cm3leon generate` and the Python blocks of README's section "Try"."""
  section = readme.partition("\n## Try\n")[2].partition("\n## ")[0].replace("\\\n", " ")
  pattern = r"^cm3leon generate [^\n]*|(?<=^```python\n).*?(?=^```)"
  return [found.strip() for found in re.findall(pattern, section, re.MULTILINE | re.DOTALL)]


def draw(example: str, folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray, bool]]:
  """Runs an example in an empty folder; yields prompt, image, and whether it has a document."""
  if not example.startswith("cm3leon"):
    (folder / "block.py").write_text(example, encoding="utf-8")
    with contextlib.chdir(folder):
      samples = runpy.run_path("block.py")["samples"]
    for sample in samples:
      yield sample.task.prompt, np.asarray(sample.image), bool(sample.neighbors)
    return
  words = [sys.executable, "-m", "cm3leon_jax", *shlex.split(example, comments=True)[1:]]
  subprocess.run(words, cwd=folder, check=True)
  [results] = folder.glob("prompts/*/results.jsonl")
  for record in map(json.loads, results.read_text("utf-8").splitlines()):
    image = np.asarray(Image.open(results.parent / record["file"]).convert("RGB"))
    yield record["prompt"], image, bool(record["neighbors"])


def error(prompt: str, image: np.ndarray, lacks_document: bool) -> str:
  """Says what is wrong with an image of an example, or returns ""."""
  if lacks_document or (clauses := parse(prompt)) is None:
    return "it retrieves no document" if lacks_document else "the judge does not understand it"
  return judge(image, {"include": clauses}).reason.replace("\n", "; ")


def main() -> int:
  wrong = []
  for example in examples(pathlib.Path("README.md").read_text("utf-8")):
    retrieves = re.search(r"\bretrieves\b|\.neighbors\b", example) is not None
    with tempfile.TemporaryDirectory() as folder:
      for prompt, image, has_document in draw(example, pathlib.Path(folder)):
        wrong.append(error(prompt, image, retrieves and not has_document))
        print(f"README, '{prompt}': {wrong[-1] or 'right'}.", flush=True)
  print(f"README: {wrong.count('')} of {len(wrong)} right.")
  return int(any(wrong) or not wrong)


if __name__ == "__main__":
  sys.exit(main())
