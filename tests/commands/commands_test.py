import glob
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cm3leon_jax import accelerators
from cm3leon_jax.commands import COMMANDS, config_file
from cm3leon_jax.extras import install
from tests.launched import cm3leon, launch

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "cm3leon_jax" / "commands"


def run(*argv, cwd=ROOT, **environment):
  """Runs a program as a user would: JAX chooses its devices itself."""
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  env |= environment
  return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def test_every_command_is_listed():
  assert sorted(COMMANDS) == sorted(
    path.stem for path in FOLDER.glob("*.py") if "common.run(" in path.read_text()
  )


# Forks a process for each command, which prints --help and then the heavy modules that it imported.
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
  assert ("  --[no]validate" in page) == (name in ("encode_documents", "inspect_data"))
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
  assert (wrong.returncode, wrong.stdout) == (2, "")
  assert wrong.stderr == "error: there is no command 'trian': did you mean 'train'?\n"
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
    assert result.returncode == 2
    assert result.stderr == (
      "error: w/documents is not finished: run `cm3leon encode_documents` with the same --config "
      "and --workdir first.\n"
    )
  result = cm3leon("evaluate", "--config=own.py:-7", "--workdir=w", cwd=tmp_path)
  assert result.stderr == "error: config.seed is -7; it must be at least 0.\n"


# A command that uses devices, without JAX_PLATFORMS.
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
  ("flags", "sentence"),
  [
    (
      ["--config.evaluation.num_documents=1"],
      "error: config.evaluation.num_documents is 1; it must be at least 2.",
    ),
    (
      ["--config.train.stepz=1"],
      "error: --config.train.stepz: the config has no such field; did you mean "
      "--config.train.steps?",
    ),
    (
      ["--config.seed=1", "--config.steps=1"],
      "error: --config.steps: the config has no such field; did you mean --config.train.steps or ",
    ),
    (
      ["--config.foo=1"],
      "error: --config.foo: the config has no such field; --print_config, with the other flags, ",
    ),
    (
      ["--config.train.steps.x=1"],
      "error: --config.train.steps.x: the config has no such field; did you mean ",
    ),
    (
      ["--config.train.steps=abc"],
      "error: --config.train.steps is abc; it must be an integer.",
    ),
    (
      ["--config=ml_configs/nope.py"],
      "error: --config=ml_configs/nope.py: there is no such file; name a Python file with a "
      "get_config function, or a shipped config: cm3leon_350m, ",
    ),
    (
      ["--config=ml_configs/scenes.py:soon"],
      "error: config variant 'soon' of scenes.py must be a positive number",
    ),
    (
      ["--num_processes=2"],
      "error: --num_processes without --coordinator_address, --process_id: give all three, or ",
    ),
    (
      ["surplus"],
      "error: unexpected argument 'surplus': commands take flags only (--name=value); ",
    ),
    (
      [],
      "error: {workdir}/documents is not finished: run `cm3leon encode_documents` with ",
    ),
  ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, flags, sentence):
  result = launch("evaluate", "--config=ml_configs/scenes.py", f"--workdir={tmp_path}", *flags)
  assert result.returncode == 2
  assert result.stderr.startswith(sentence.format(workdir=tmp_path))
  assert result.stderr.count("\n") == 1


EVALUATE = ["--config=scenes", "--workdir=w"]
CONFIG = "from cm3leon_jax.settings import default_config\ndef get_config():\n  "


@pytest.mark.parametrize(
  ("flags", "config", "sentence"),
  [
    (
      ["--workdir=w"],
      "",
      "w/train/config.json does not exist: name the workdir of a run in which ",
    ),
    (["--config=scenes"], "", "name the folder of the run: --workdir=workdir\n"),
    (
      [*EVALUATE, "--steps=5"],
      "",
      "--steps is not a flag of this command; a field of the config is set by "
      "--config.train.steps or --config.clip.steps or --config.vqgan.steps.\n",
    ),
    (
      [*EVALUATE, "--sampling.top_p=0.5"],
      "",
      "--sampling.top_p is not a flag of this command; a field of the config is set by "
      "--config.sampling.top_p.\n",
    ),
    (
      [*EVALUATE, "--workdri=x"],
      "",
      "--workdri is not a flag of this command: did you mean --workdir?\n",
    ),
    (
      ["--workdir=w", "--config.train.steps=5"],
      "",
      "--config.train.steps is given, but no config before it: name a config: --config=",
    ),
    (
      ["--config=own.py", "--workdir=w"],
      "x = 1\n",
      "--config=own.py: the file has no function get_config; it must have one that returns a "
      "config.\n",
    ),
    (
      ["--config=own.py", "--workdir=w"],
      f"{CONFIG}pass\n",
      "--config=own.py: get_config returns NoneType; it must return an "
      "ml_collections.ConfigDict.\n",
    ),
    (
      ["--config=own.py", "--workdir=w"],
      f"{CONFIG}return x\n",
      "--config=own.py cannot be loaded: NameError: name 'x' is not defined (",
    ),
    (
      ["--config=own.py", "--workdir=w"],
      f"{CONFIG}c = default_config()\n  del c['vqgan']\n  return c\n",
      "config has no section 'vqgan': start from cm3leon_jax.configs.base.get_config(), ",
    ),
    (
      ["--config=scenes", "--workdir=gs://bucket/run"],
      "",
      f"--workdir=gs://bucket/run is in a GCS bucket, which needs gcsfs: {install('data')}.\n",
    ),
  ],
)
def test_a_wrong_config_or_flag_ends_in_one_sentence(tmp_path, flags, config, sentence):
  (tmp_path / "w").mkdir()
  if config:
    (tmp_path / "own.py").write_text(config)
  result = launch("evaluate", *flags, cwd=tmp_path, missing=["gcsfs"])
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {sentence}")
  assert result.stderr.count("\n") == 1


def test_a_command_that_makes_a_run_needs_a_config(tmp_path):
  result = launch("train", "--workdir=w", cwd=tmp_path)
  assert result.returncode == 2
  assert result.stderr == "error: name a config: --config=scenes\n"


def test_a_bucket_as_source_needs_its_extra(tmp_path):
  flags = ["--config=scenes", "--workdir=w", "--config.raw.source=gs://bucket/pairs"]
  result = launch("prepare_data", *flags, cwd=tmp_path, missing=["gcsfs"])
  assert result.returncode == 2
  assert result.stderr == (
    "error: config.raw.source: gs://bucket/pairs cannot be opened: Please install gcsfs "
    f"to access Google Storage (GCS buckets need {install('data')}).\n"
  )


def test_a_license_that_no_drawing_has_ends_at_once(tmp_path):
  licenses = "--config.raw.licenses=('CC0-1.0',)"
  result = launch("prepare_data", "--config=scenes", f"--workdir={tmp_path}", licenses)
  assert result.returncode == 2
  assert result.stderr == (
    "error: config.raw.licenses is ('CC0-1.0',), but the license of scenes's drawings is "
    "Apache-2.0: add it.\n"
  )


def test_a_command_of_one_process_refuses_several(tmp_path):
  result = launch("report", "--config=scenes", f"--workdir={tmp_path}", "--num_processes=2")
  assert result.returncode == 2
  assert result.stderr == (
    "error: --num_processes is given, but this command runs in one process; only cm3leon train, "
    "cm3leon evaluate --protocol and cm3leon score run in several.\n"
  )


def test_report_of_an_empty_workdir_is_refused(tmp_path):
  result = launch("report", "--config=scenes", f"--workdir={tmp_path}")
  assert result.returncode == 2
  assert result.stderr == (
    f"error: --workdir {tmp_path} has no finished stage: run `cm3leon prepare_data` "
    "with the same --config and --workdir first.\n"
  )


def test_report_lists_what_has_not_run(tmp_path):
  (tmp_path / "raw").mkdir()
  done = {"config": {}, "summary": {}, "seconds": 1.0, "id": "1"}
  (tmp_path / "raw" / "done.json").write_text(json.dumps(done))
  result = launch("report", "--config=ml_configs/scenes.py:2", f"--workdir={tmp_path}")
  assert result.returncode == 0, result.stderr
  assert "not run" in result.stdout
  assert "ml_configs/scenes.py:2" in (tmp_path / "report.html").read_text()


DEMOS = ("demo.sh", "demo_instructions.sh")


@pytest.mark.parametrize("script", DEMOS)
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--minutes", "0"], "error: --minutes is '0'; it must be a positive whole number; usage: "),
    (["--minutes=2.5"], "error: --minutes is '2.5'; it must be a positive whole number; usage: "),
    (["--workdir"], "error: --workdir needs a value; usage: "),
    (["--epochs", "3"], "error: unexpected argument '--epochs'; usage: "),
  ],
)
def test_demo_refuses_bad_arguments_in_one_sentence(tmp_path, script, arguments, sentence):
  refused(tmp_path, script, arguments, sentence)


def refused(folder, script, arguments, sentence):
  result = run("bash", str(ROOT / "launch" / script), *arguments, cwd=folder)
  assert result.returncode == 2
  assert result.stderr.startswith(sentence)
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


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
  old.write_text("#!/bin/sh\nexit 1\n")  # It fails the check of its version.
  old.chmod(0o755)
  result = run("bash", "-c", f'source "{ROOT}/launch/venv.sh"; find_python', PYTHON=str(old))
  assert result.returncode == 2
  message = f"PYTHON is '{old}'; it must be an interpreter of Python 3.11 or newer."
  assert result.stderr == f"error: {message}\n"
