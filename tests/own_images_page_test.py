"""Runs every code block of the tutorial docs/own_images.md in order, on a tiny folder."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from benchmarks.evidence import own_images

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_images.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Text of the page -> replacement that makes the test faster.
SMALLER = {"--config=own ": "--config=own:0.1 ", "own.get_config()": 'own.get_config("0.1")'}
SMALLER |= {'"steps": 500, "checkpoint_every": 100': '"steps": 10, "checkpoint_every": 5'}
PORT = "8080"


def test_every_block_of_the_page_is_run_or_shows_a_folder():
  assert {kind for kind, _ in BLOCKS} == {"text", "bash", "python"}
  assert PAGE.count("```") == 2 * len(BLOCKS)
  assert all(old in "".join(block for _, block in BLOCKS) for old in SMALLER)


def shell(folder, command):
  """Starts a code block in a shell in which `cm3leon` and `python` are those of the tests."""
  run = f'"{sys.executable}" -m cm3leon_jax'
  functions = f'cm3leon() {{ {run} "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'
  # With `exec`, signals reach the server instead of the shell.
  if command.startswith("cm3leon serve"):
    functions, command = "", command.replace("cm3leon", f"exec {run}", 1)
  # Users have one device; XLA_FLAGS of the tests would make 8.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.Popen(
    ["bash", "-euc", functions + command],
    cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def serve(folder, command):
  """Starts the page's server on a free port; returns (process, port)."""
  server = shell(folder, command.replace(f"--port={PORT}", "--port=0"))
  for line in server.stdout:
    if found := re.search(r"http://[\w.]+:(\d+)", line):
      return server, found[1]
  raise AssertionError("the server did not print its address")


@pytest.mark.slow
def test_the_blocks_run_in_their_order(tmp_path):
  images = tmp_path / "my_images"
  images.mkdir()
  for name, fact, image in own_images.pairs()[:60]:
    image.save(images / f"{name}.jpg")
    (images / f"{name}.txt").write_text(fact.caption)
  server, port = None, PORT
  try:
    for kind, block in BLOCKS:
      for old, new in SMALLER.items():
        block = block.replace(old, new)
      if kind == "python":
        (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
      elif kind == "bash" and block.startswith("cm3leon serve"):
        server, port = serve(tmp_path, block)
      elif kind == "bash":
        process = shell(tmp_path, block.replace(f":{PORT}", f":{port}"))
        shown, _ = process.communicate(timeout=1_800)
        assert process.returncode == 0, shown
  finally:
    if server:
      server.terminate()
      server.communicate(timeout=60)
  assert (tmp_path / "my_run" / "report.html").exists()
  assert len(list((tmp_path / "my_run" / "prompts").glob("*/*.png"))) >= 9
  assert list((tmp_path / "my_tuned" / "prompts").glob("*/results.jsonl"))
  answer = json.loads((tmp_path / "answer.json").read_text())
  assert len(answer["data"]) == 1
  assert answer["created"] <= time.time()
