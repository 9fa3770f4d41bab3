import pathlib

import pytest

from tests.launched import python

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys, threading, time
from absl import flags
from cm3leon_jax.commands import common

class Waiting(threading.Thread):
  def run(self):
    time.sleep(120)

Waiting.__module__ = sys.argv[1]
Waiting(daemon=sys.argv[1] == "none").start()

def main(_):
  if sys.argv[2] == "interrupt":
    raise KeyboardInterrupt
  sys.exit(int(sys.argv[2]))

common.run_app(main, flags.FLAGS)
"""


@pytest.mark.parametrize(
  ("module", "end", "code", "sentence"),
  [
    ("orbax.checkpoint", "75", 75, ""),
    ("none", "3", 3, ""),
    ("other", "interrupt", 130, "error: interrupted by Ctrl-C; finished stages and checkpoints"),
  ],
)
def test_it_ends_with_its_code(module, end, code, sentence):
  result = python(SCRIPT, module, end, cwd=ROOT, timeout=60)
  assert result.returncode == code
  assert result.stderr.startswith(sentence)
  assert bool(result.stderr) == bool(sentence)
