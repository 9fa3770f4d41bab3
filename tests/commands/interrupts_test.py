import pathlib
import signal

import pytest

from cm3leon_jax.commands.interrupts import INTERRUPTION
from cm3leon_jax.errors import CTRL_C, INTERRUPTED, STOPPED_EARLY
from tests.launched import python

ROOT = pathlib.Path(__file__).parents[2]
# A signal arrives in a callback of the garbage collector, where its exception is dropped.
SCRIPT = """
import gc, runpy, signal, sys, time
from cm3leon_jax import __main__
from cm3leon_jax.commands import interrupts
number, handler, later = (int(word) for word in sys.argv[1:])
interrupts.SECONDS[interrupts.stop_early] = 1.0

def command(*_, **__):
  if handler:
    signal.signal(number, interrupts.stop_early)
  gc.callbacks.append(lambda phase, _: phase == "start" and signal.raise_signal(number))
  gc.collect()
  gc.callbacks.clear()
  if later:
    signal.signal(number, lambda number, _: sys.exit(70 + number))
  time.sleep(30)

runpy.run_module = command
__main__.start("generate")
"""


@pytest.mark.parametrize(
  ("number", "handler", "later", "code"),
  [
    (signal.SIGINT, False, False, CTRL_C),
    (signal.SIGTERM, True, False, INTERRUPTED),
    (signal.SIGTERM, True, True, 70 + signal.SIGTERM),  # A loop begins, and handles the signal.
  ],
)
def test_a_signal_whose_exception_is_dropped_ends_the_command(number, handler, later, code):
  result = python(SCRIPT, int(number), int(handler), int(later), cwd=ROOT, timeout=25)
  assert result.returncode == code
  assert "Exception ignored in" in result.stderr
  assert result.stderr.endswith(f"\n{INTERRUPTION}") == (not handler)
  assert result.stdout == f"{STOPPED_EARLY}\n" * handler


def test_ctrl_c_during_an_import_ends_the_process_without_an_exception(tmp_path):
  (tmp_path / "slow.py").write_text(
    "import signal\ntry:\n  signal.raise_signal(signal.SIGINT)\nfinally:\n  print('unwound')\n"
  )
  script = (
    "from cm3leon_jax.commands import interrupts\ninterrupts.listen()\n"
    f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport slow"
  )
  result = python(script, cwd=ROOT, timeout=25)
  assert (result.returncode, result.stdout, result.stderr) == (CTRL_C, "", INTERRUPTION)
