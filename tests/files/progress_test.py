import os
import pathlib
import pty
import subprocess
import sys
import termios

from cm3leon_jax.files import progress

ROOT = pathlib.Path(__file__).parents[1]
WORK = """
import time
from cm3leon_jax.files import progress
progress.SECONDS = 0.05
for _ in progress.progress_bar(range(20), "{name}", unit="step", leave={leave}):
  time.sleep(0.02)
print("done", file=__import__("sys").stderr)
"""


def run(stderr, name="vqgan", leave=True):
  code = WORK.format(name=name, leave=leave)
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=stderr, check=True, timeout=60)


def test_a_log_has_whole_lines(tmp_path):
  with (tmp_path / "log").open("w") as log:
    run(log)
  text = (tmp_path / "log").read_text()
  assert "\r" not in text
  assert text.isascii()
  *lines, last = text.split("\n")[:-1]
  assert last == "done"
  assert 3 <= len(lines) <= 12  # 20 steps take 0.4 s and print a line every 0.05 s.
  assert all(line.startswith("vqgan: ") for line in lines)
  assert f"|{20 * '#'}| 20/20 [" in lines[-1]


def test_nested_bars_in_a_log_do_not_move_the_cursor(tmp_path, monkeypatch):
  with (tmp_path / "log").open("w") as log:
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress.progress_bar(range(2), "outer"):
      list(progress.progress_bar(range(3), "inner"))
  text = (tmp_path / "log").read_text()
  assert "inner: 100%" in text
  assert "\x1b" not in text


def test_a_terminal_has_a_bar_in_one_line():
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 80))
  run(theirs)
  os.close(theirs)
  text = os.read(ours, 1 << 16).decode()
  os.close(ours)
  assert text.count("\r\n") == 2  # The last state of the bar, and "done".
  assert "\rvqgan: 100%" in text
