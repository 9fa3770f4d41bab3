import importlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = sorted(
  path.stem
  for path in (ROOT / "launch").glob("*.py")
  if path.stem not in ("__init__", "common", "sharded")
)


def run(*argv, cwd=ROOT):
  return subprocess.run(
    argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ, check=False
  )


def command(name, *flags):
  return run(sys.executable, "-m", f"launch.{name}", *flags)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_to_run_it(name):
  module = importlib.import_module(f"launch.{name}")
  assert f"python -m launch.{name} --config=" in module.__doc__
  assert callable(module.main)


def test_print_config_prints_every_field_and_marks_what_is_not_the_default():
  flags = ["--config=ml_configs/cm3leon_350m.py", "--config.train.steps=5", "--print_config"]
  result = command("train", *flags)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert "train.steps = 5  # default: 41723" in lines
  assert "model.num_layers = 24  # default: 32" in lines
  assert "model.family = 'opt'" in lines


def test_help_shows_the_docstring_and_the_flags(tmp_path):
  shown = command("encode_documents", "--help").stdout
  assert "python -m launch.encode_documents --config=ml_configs/openmoji.py" in shown
  assert all(f"--{name}: " in shown for name in ("config", "workdir", "runner", "ray_address"))
  assert "--[no]validate: " in shown


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (
      ["--config.evaluation.num_documents=1"],
      "error: config.evaluation.num_documents is 1; it must be at least 2.",
    ),
    (
      ["--config.train.stepz=1"],
      "error: a --config.SECTION.FIELD flag names an unknown field: 'stepz' Did you mean \"steps\"",
    ),
    (
      ["--config.train.steps=abc"],
      "error: flag --config.train.steps=abc: invalid literal for int()",
    ),
    (
      ["--config=ml_configs/nope.py"],
      "error: --config could not be loaded, name a Python file with a get_config function: ",
    ),
    (
      ["--config=ml_configs/openmoji.py:soon"],
      "error: config variant 'soon' of openmoji.py must be a positive number",
    ),
    (
      ["--num_processes=2"],
      "error: --num_processes is given, but this command runs in one process; only launch.train runs in",
    ),
    (["surplus"], "error: unexpected argument 'surplus': commands take flags only (--name=value)."),
    (
      [],
      "error: {workdir}/documents is not finished: run `python -m launch.encode_documents` with the same --config",
    ),
  ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, flags, sentence):
  result = command("evaluate", "--config=ml_configs/openmoji.py", f"--workdir={tmp_path}", *flags)
  assert result.returncode == 2
  assert result.stderr.startswith(sentence.format(workdir=tmp_path))
  assert result.stderr.count("\n") == 1


def test_report_of_an_empty_workdir_says_what_is_missing(tmp_path):
  result = command("report", "--config=ml_configs/openmoji.py:2", f"--workdir={tmp_path}")
  assert result.returncode == 0, result.stderr
  assert "not run" in result.stdout
  assert "ml_configs/openmoji.py:2" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--minutes", "0"], "error: --minutes is '0'; it must be a positive whole number; usage: "),
    (["--minutes=2.5"], "error: --minutes is '2.5'; it must be a positive whole number; usage: "),
    (["--workdir"], "error: --workdir needs a value; usage: "),
    (["--epochs", "3"], "error: unexpected argument '--epochs'; usage: "),
  ],
)
def test_demo_refuses_bad_arguments_in_one_sentence(tmp_path, arguments, sentence):
  result = run("bash", str(ROOT / "launch" / "demo.sh"), *arguments, cwd=tmp_path)
  assert result.returncode == 2
  assert result.stderr.startswith(sentence)
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


def test_demo_shows_its_usage(tmp_path):
  result = run("bash", str(ROOT / "launch" / "demo.sh"), "--help", cwd=tmp_path)
  assert result.returncode == 0
  assert result.stdout.startswith("usage: bash launch/demo.sh [--workdir DIR] [--minutes N]")


def test_an_old_python_is_refused(tmp_path):
  old = tmp_path / "old-python"
  old.write_text(
    "#!/bin/sh\nexit 1\n"
  )  # How an older interpreter answers the question for its version.
  old.chmod(0o755)
  script = f'source "{ROOT}/launch/venv.sh"; find_python'
  result = subprocess.run(
    ["bash", "-c", script],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHON": str(old)},
    check=False,
  )
  assert result.returncode == 2
  assert (
    result.stderr
    == f"error: PYTHON is '{old}'; it must be an interpreter of Python 3.11 or newer.\n"
  )
