import os
import signal
import sys
import threading

from etils import epath
import pytest

from cm3leon_jax.commands import stage_process
from cm3leon_jax.errors import CTRL_C, INTERRUPTED, UserError
from tests.refusals import refused

WAITS = """
import signal, sys
def stop(number, _):
  print(f"saved at signal {number}")
  sys.exit(CODE)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("waits")
signal.pause()
"""
OUTLIVES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("waits")
time.sleep(0.5)
"""


@pytest.fixture(autouse=True)
def handlers():
  old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  yield
  for number, handler in old.items():
    signal.signal(number, handler)


@pytest.fixture
def run(tmp_path, monkeypatch):
  def run_program(text: str, show=lambda line: None) -> list[str]:
    monkeypatch.setattr(stage_process, "program", lambda name: [sys.executable, "-c", text, name])
    lines: list[str] = []
    processes = stage_process.StageProcesses(epath.Path(tmp_path))
    processes.run("train", ["--workdir=w"], lambda line: (lines.append(line), show(line)))
    return lines

  return run_program


def test_a_command_gets_its_flags_and_what_it_prints_is_shown_and_appended_to_its_log(
  run, tmp_path
):
  text = "import sys; print(sys.argv[1:]); print('progress', file=sys.stderr)"
  for _ in range(2):
    assert sorted(run(text)) == ["['train', '--workdir=w']", "progress"]
  assert (tmp_path / "train.log").read_text().count("progress\n") == 2


def test_the_program_is_that_of_the_package_or_of_the_checkout(monkeypatch):
  monkeypatch.delitem(sys.modules, "launch", raising=False)
  assert stage_process.program("train") == [sys.executable, "-m", "cm3leon_jax", "train"]
  monkeypatch.setitem(sys.modules, "launch", stage_process)
  assert stage_process.program("train") == [sys.executable, "-m", "launch.train"]


def test_a_stage_that_fails_ends_the_run_with_its_sentence_and_exit_code(run, capsys):
  text = "import sys; print('step 1'); print('error: no images.', file=sys.stderr); sys.exit(7)"
  with refused(UserError, "images", exit_code=7):
    run(text)
  assert capsys.readouterr().err == ""


def test_a_stage_that_crashes_shows_its_last_lines_and_its_log(run, tmp_path, capsys):
  with refused(UserError, "1", "train", exit_code=1):
    run("print(*range(50), sep='\\n')\n1 / 0")
  shown = capsys.readouterr().err
  assert "49\n" in shown
  assert "ZeroDivisionError" in shown
  assert "20\n" not in shown


def test_a_killed_stage_says_that_the_same_command_continues(run):
  with refused(UserError, "SIGKILL", "command", exit_code=128 + signal.SIGKILL):
    run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, INTERRUPTED), (signal.SIGINT, CTRL_C)]
)
def test_a_signal_reaches_the_stage_which_saves_before_the_run_ends(run, number, code):
  def send(line):
    if line == "waits":
      threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

  with refused(UserError, "saved at signal", exit_code=code):
    run(WAITS.replace("CODE", str(code)), send)


@pytest.mark.parametrize(
  "program", [OUTLIVES, OUTLIVES.replace("SIG_IGN", "SIG_DFL")], ids=["ignores", "ends"]
)
def test_a_signal_that_a_stage_does_not_answer_ends_the_run(run, program):
  def send(line):
    os.kill(os.getpid(), signal.SIGTERM)

  with refused(UserError, "stopped", "command", exit_code=INTERRUPTED):
    run(program, send)
