import glob
import html
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cm3leon_jax import accelerators
from cm3leon_jax.commands import COMMANDS, config_file
from tests.launched import cm3leon, launch
from tests.refusals import check_refused

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "cm3leon_jax" / "commands"


def run(*argv, cwd=ROOT, **environment):
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  env |= environment
  return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def test_every_command_is_listed():
  assert sorted(COMMANDS) == sorted(
    path.stem for path in FOLDER.glob("*.py") if "common.run(" in path.read_text()
  )


# For each command, forks a process that prints --help and then the heavy modules it imported.
HELP = """
import gc, os, runpy, sys
import cm3leon_jax.commands.common  # Of all commands, and without the heavy modules.
gc.freeze()
folder, *names = sys.argv[1:]
for name in names:
  if os.fork():
    os.wait()
    continue
  for number, file in ((1, name), (2, f"{name}.errors")):
    os.dup2(os.open(f"{folder}/{file}", os.O_WRONLY | os.O_CREAT), number)
  sys.argv = [f"launch.{name}", "--help"]
  try:
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    print(end.code, sorted({"jax", "flax", "matplotlib", "scipy"} & set(sys.modules)))
  break
"""
ALWAYS = ["--config=VALUE", "--config.SECTION.FIELD=VALUE"]
PROCESSES = "--coordinator_address=VALUE"
SHARDS = "--ray_address=VALUE"


@pytest.fixture(scope="module")
def help_pages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("help")
  assert run(sys.executable, "-c", HELP, str(folder), *COMMANDS).returncode == 0
  return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_the_commands_own_flags_without_importing_jax(name, help_pages):
  text = (help_pages / name).read_text()
  *page, imported = text.splitlines()
  assert (imported, (help_pages / f"{name}.errors").read_text()) == ("0 []", "")
  takes_config = name not in ("checkpoints", "serve")
  without = dict.fromkeys(("serve", "generate", "score", "evaluate", "export"), "--workdir=")
  first = {**without, "checkpoints": "list --workdir="}.get(name, "--config=")
  assert f"cm3leon {name} {first}" in text
  assert [f"  {flag}" in page for flag in ALWAYS] == [takes_config] * len(ALWAYS)
  assert ("  --workdir=VALUE" in page) == (name != "aot_compile")
  assert (f"  {PROCESSES}" in page) == (name in ("train", "evaluate", "score"))
  assert (f"  {SHARDS}" in page) == (
    name in ("prepare_data", "encode_documents", "encode_instructions", "build_neighbors")
  )
  assert ("  --allow_changed=VALUE" in page) == (name in ("train", "reinforce"))
  assert ("  --[no]allow_outside" in page) == (name in ("evaluate", "generate", "score"))
  assert ("  --min_psnr=VALUE" in page) == (
    name in ("encode_documents", "encode_instructions", "run")
  )
  assert ("  --[no]validate" in page) == (name == "inspect_data")
  assert max(len(line) for line in page if line.startswith("      ")) <= 100
  assert "--pdb" not in text


def test_print_config_prints_every_field_and_marks_what_is_not_the_default():
  flags = ["--config=ml_configs/cm3leon_350m.py", "--config.train.steps=5", "--print_config"]
  result = launch("train", *flags)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert "train.steps = 5  # default: 41723" in lines
  assert "model.num_layers = 24  # default: 32" in lines
  assert "model.family = 'opt'" in lines


def test_the_console_script_lists_commands_and_suggests_one(tmp_path):
  for argv in ([], ["--help"]):
    result = cm3leon(*argv, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert max(map(len, lines)) <= 140
  wrong = cm3leon("trian", cwd=tmp_path)
  check_refused(wrong)
  shown = cm3leon("train", "--help", cwd=tmp_path).stdout
  assert "cm3leon train --config=scenes --workdir=workdir/scenes" in shown


def test_a_config_by_name_or_by_path_works_in_any_folder(tmp_path):
  (tmp_path / "own.py").write_text(
    "from cm3leon_jax.configs import base\n"
    "def get_config(seed='3'):\n"
    "  config = base.get_config()\n  config.seed = int(seed)\n  return config\n"
  )
  (tmp_path / "w").mkdir()
  for config in ("scenes:2", str(tmp_path / "own.py")):
    result = cm3leon("evaluate", f"--config={config}", "--workdir=w", cwd=tmp_path)
    check_refused(result)
  result = cm3leon("evaluate", "--config=own.py:-7", "--workdir=w", cwd=tmp_path)
  check_refused(result)


# Program that runs a command that uses devices, with JAX_PLATFORMS unset.
DEVICES = """
from cm3leon_jax.commands import common
from cm3leon_jax.commands.common import use_mesh
def main(settings):
  with use_mesh(settings):
    import jax
    print(jax.devices()[0].platform)
common.run(main, workdir=False)
"""


@pytest.mark.skipif(
  any(map(glob.glob, accelerators.DEVICE_FILES)), reason="this machine has an accelerator"
)
def test_a_machine_without_accelerators_prints_no_warnings():
  result = run(sys.executable, "-c", DEVICES, "--config=scenes")
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout == "cpu\n"


@pytest.mark.parametrize(
  ("found", "variables", "expected"),
  [
    ([], {}, "cpu"),
    (["/dev/vfio/[0-9]*"], {}, None),
    (["/dev/nvidia[0-9]*"], {}, None),
    ([], {"JAX_PLATFORMS": "tpu"}, "tpu"),
  ],
)
def test_jax_looks_for_accelerators_if_the_machine_has_device_files(
  found, variables, expected, monkeypatch
):
  monkeypatch.setattr(accelerators.glob, "glob", lambda pattern: [p for p in found if p == pattern])
  monkeypatch.setattr(accelerators.os, "environ", variables)
  accelerators.use_cpu_if_alone()
  assert variables.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize(
  "flags",
  [
    ["--config.evaluation.num_documents=1"],
    ["--config.seed=1", "--config.steps=1"],
    ["--config.foo=1"],
    ["--config.train.steps.x=1"],
    ["--config.train.steps=abc"],
    ["--config=ml_configs/nope.py"],
    ["--config=ml_configs/scenes.py:soon"],
    ["--num_processes=2"],
    [],
  ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, flags):
  config = "--config=ml_configs/scenes.py"
  check_refused(launch("evaluate", config, f"--workdir={tmp_path}", *flags))


CONFIG = "from cm3leon_jax.settings import default_config\ndef get_config():\n  "


@pytest.mark.parametrize(
  ("flags", "config"),
  [
    ([], ""),
    (["--config=scenes", "--sampling.top_p=0.5"], ""),
    (["--config=own.py"], "x = 1\n"),
    (["--config=own.py"], f"{CONFIG}pass\n"),
    (["--config=own.py"], f"{CONFIG}return x\n"),
    (["--config=own.py"], f"{CONFIG}c = default_config()\n  del c['vqgan']\n  return c\n"),
  ],
)
def test_a_wrong_config_or_flag_ends_in_one_sentence(tmp_path, flags, config):
  (tmp_path / "w").mkdir()
  if config:
    (tmp_path / "own.py").write_text(config)
  check_refused(launch("evaluate", *flags, "--workdir=w", cwd=tmp_path))


def test_report_lists_what_has_not_run(tmp_path):
  (tmp_path / "raw").mkdir()
  done = {"config": {}, "summary": {}, "seconds": 1.0, "id": "1"}
  (tmp_path / "raw" / "done.json").write_text(json.dumps(done))
  changed = "--config.raw.source=my images"
  result = launch("report", "--config=ml_configs/scenes.py:2", changed, f"--workdir={tmp_path}")
  assert result.returncode == 0, result.stderr
  assert "not run" in result.stdout
  page = html.unescape((tmp_path / "report.html").read_text())
  assert f"cm3leon train --config=ml_configs/scenes.py:2 '{changed}' --workdir=DIR" in page


DEMOS = ("demo.sh", "demo_instructions.sh")


@pytest.mark.parametrize("script", DEMOS)
@pytest.mark.parametrize(
  "arguments", [["--minutes", "0"], ["--minutes=2.5"], ["--workdir"], ["--epochs", "3"]]
)
def test_demo_refuses_bad_arguments_in_one_sentence(tmp_path, script, arguments):
  check_refused(run("bash", str(ROOT / "launch" / script), *arguments, cwd=tmp_path))


@pytest.mark.parametrize("script", DEMOS)
def test_demo_shows_its_usage(tmp_path, script):
  result = run("bash", str(ROOT / "launch" / script), "--help", cwd=tmp_path)
  assert result.returncode == 0
  usage = f"usage: bash launch/{script} [--workdir DIR] [--minutes N]\n"
  assert result.stdout.startswith(usage)


def test_every_config_of_the_demo_takes_minutes():
  for name in ("scenes", "scenes_instruct"):
    short, long = (config_file.load(f"{ROOT}/ml_configs/{name}.py:{n}") for n in (2, 15))
    assert 0 < short.train.steps < long.train.steps


def test_an_old_python_is_refused(tmp_path):
  old = tmp_path / "old-python"
  old.write_text("#!/bin/sh\nexit 1\n")  # As if the check of the Python version fails.
  old.chmod(0o755)
  result = run("bash", "-c", f'source "{ROOT}/launch/venv.sh"; find_python', PYTHON=str(old))
  check_refused(result)
