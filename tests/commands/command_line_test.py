"""Tests that commands show their flags, and name a wrong flag in one sentence, without JAX."""

import html
import json
import pathlib

import pytest

from cm3leon_jax.commands import COMMANDS, command_line, common
from tests.launched import SCENES, SLOW, cm3leon, launch
from tests.refusals import check_refused

FOLDER = pathlib.Path(common.__file__).parent
ROOT = FOLDER.parents[1]
RUN = [f"--config={SCENES}", "--workdir=w"]
WITHOUT_CONFIG = ("bank", "checkpoints", "docs", "serve")


def test_every_command_is_listed():
  assert sorted(COMMANDS) == sorted(
    path.stem for path in FOLDER.glob("*.py") if "common.run(" in path.read_text()
  )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_the_flags_that_the_command_takes(name):
  result = launch(name, "--help", missing=["jax"])
  assert (result.returncode, result.stderr) == (0, "")
  assert f"cm3leon {name} " in result.stdout
  takes = {
    flag: f"\n  --{flag}: " in result.stdout for flag in ("config", "workdir", "num_processes")
  }
  assert takes == {
    "config": name not in WITHOUT_CONFIG,
    "workdir": name not in ("aot_compile", "docs"),
    "num_processes": name in ("train", "evaluate", "score"),
  }


def test_help_of_a_command_is_its_flag():
  assert cm3leon("help", "train").stdout == cm3leon("train", "--help").stdout != ""


MISTAKES = [
  (["trian"], ["trian", "train"]),
  (["finetune"], ["`cm3leon run --config=own`", "CM3Leon.finetune"]),
  (["help", "trian"], ["trian", "did you mean 'train'?"]),
  (["train", *RUN, "--workdri=x"], ["workdri", "workdir"]),
  (["train", *RUN, "--config.train.stepz=5"], ["error: config.train.stepz ", "mean 'steps'?"]),
  (["train", *RUN, "--config.foo.bar=5"], ["foo"]),
  (["train", *RUN, "--config.train.steps=abc"], ["--config.train.steps", "abc"]),
  (["train", *RUN, "--config.train=abc"], ["--config.train", "abc"]),
  (["train", "--config.seed=5", *RUN], ["config.seed"]),
  (["train", "--config=nowhere.py", "--workdir=w"], ["nowhere.py", "own"]),
  (["train", "--config=onw", "--workdir=w"], ["onw", "did you mean 'own'?"]),
  (["docs", "own_image"], ["did you mean 'own_images'?"]),
  (["docs", "config", "train.patiense"], ["train.patiense", "did you mean 'train.patience'?"]),
  (["train", f"--config={SCENES}:soon", "--workdir=w"], ["--config", "soon"]),
  (["train", "--workdir=w"], ["--config"]),
  (["train", f"--config={SCENES}"], ["--workdir"]),
  (["train", f"--config={SCENES}", "--workdir=a.txt"], ["--workdir", "a.txt"]),
  (["report", *RUN, "--num_processes=2"], ["num_processes"]),
  (["generate", *RUN, "--task=draw"], ["--task", "draw", "edit"]),
  (["generate", *RUN, "--prompt=a", "red", "bell"], ["red", "quotes"]),
  (["generate", "--workdir=scenes", "--prompt=a", "--guidance=-3"], ["--guidance", "-3"]),
  (["generate", "--workdir=scenes", "--prompt=a", "--guidance=much"], ["--guidance", "much"]),
  (["generate", "--workdir=scenes", "--prompt=a", "--retrieve=-1"], ["--retrieve", "-1"]),
  (["generate", "--workdir=scenes", "--prompt=a", "--top_p=2"], ["--top_p is 2"]),
  (["generate", "--workdir=scenes", "--task=caption"], ["caption", "--image"]),
  (["generate", "--workdir=scenes", "--samples=abc"], ["--samples=abc", "whole number"]),
  (["generate", "--config.sampling.top_k=3"], ["--config first", "--top_k"]),
  (["score", "--workdir=scenes"], ["--documents"]),
  (["score", "--workdir=scenes", "--documents=a", "--retrieve=1,2"], ["--retrieve", "1,2"]),
  (["export", "--workdir=scenes", "--output=a.txt"], ["--output", "a.txt"]),
  (["checkpoints", "lisst", "--workdir=w"], ["list", "rollback"]),
  (["checkpoints", "list", "4", "--workdir=w"], ["4"]),
  (["serve", *RUN], ["config"]),
]


@pytest.mark.parametrize(("argv", "facts"), MISTAKES)
def test_a_wrong_command_line_is_one_sentence_before_jax_is_imported(argv, facts, tmp_path):
  (tmp_path / "a.txt").touch()
  check_refused(cm3leon(*argv, cwd=tmp_path, missing=["jax"]), *facts)
  assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


SMALL = ["--config=own", "--config.raw.source=."]
LATER = [
  (["run", *SMALL, "--config.model.width=256"], ["config.model.width is 256", "has 192", "none"]),
  (["evaluate", f"--config={SCENES}", "--config.evaluation.num_documents=1"], ["num_documents"]),
  (["prepare_data", "--config=cm3leon_7b"], ["config.raw.source"]),
  (["prepare_data", f"--config={SCENES}", "--config.vqgan.resolution=50"], ["vqgan", "50"]),
  (["train_clip", f"--config={SCENES}", "--config.clip.resolution=50"], ["clip", "50"]),
  (["report", f"--config={SCENES}"], ["w", "prepare_data"]),
  (["prepare_data", f"--config={SCENES}", "--config.raw.source=s3://b/p"], ["s3://b/p", "S3"]),
]


@pytest.mark.parametrize(("argv", "facts"), LATER)
def test_a_mistake_is_found_before_anything_is_written(argv, facts, tmp_path):
  (tmp_path / "w").mkdir()
  check_refused(cm3leon(*argv, "--workdir=w", cwd=tmp_path), *facts)
  assert not list((tmp_path / "w").iterdir())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
  result = cm3leon("export", "--workdir=scenes", "--output=/proc/x/y", cwd=tmp_path, imported=SLOW)
  check_refused(result, "--output=/proc/x/y", "No such file")


def test_home_folders_are_replaced_in_paths_and_not_in_prompts(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  given = ["--workdir=~/run", "-config.raw.source=~/in", "--prompts=~/p", "--config", "~/c.py"]
  kept = ["--prompt=~/x", "--out=gs://b/~/x", "--out=./~", "~/y"]
  replaced = ["--workdir=/home/ada/run", "-config.raw.source=/home/ada/in", "--prompts=/home/ada/p"]
  assert command_line.with_homes([*given, *kept]) == [*replaced, *given[3:], *kept]


def test_docs_lists_the_pages_and_prints_one(tmp_path):
  result = launch("docs", cwd=tmp_path, missing=["jax"])
  listed = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
  assert listed == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
  assert "glossary           Each word has one meaning" in result.stdout
  page = launch("docs", "glossary", cwd=tmp_path, missing=["jax"]).stdout
  assert page == (ROOT / "docs" / "glossary.md").read_text()


def test_docs_prints_a_field_of_the_config(tmp_path):
  line = launch("docs", "config", "train.patience", cwd=tmp_path, missing=["jax"]).stdout
  assert line.startswith("train.patience = 0 (int, >= 0): ")
  assert line.count("\n") == 1


def test_the_console_script_lists_the_commands(tmp_path):
  result = cm3leon(cwd=tmp_path)
  assert (result.returncode, result.stderr) == (0, "")
  names = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
  assert names == list(COMMANDS)


OWN = """
from cm3leon_jax.configs import defaults
def get_config(seed="3"):
  config = defaults.get_config()
  config.seed = int(seed)
  return config
"""


def test_print_config_prints_every_field_of_a_config_of_ones_own(tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  flags = ["--config=own.py:7", "--config.train.steps=5", "--print_config"]
  result = launch("train", *flags, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert {"seed = 7  # default: 0", "train.steps = 5  # default: 41723"} <= set(lines)
  assert "model.family = 'opt'" in lines


@pytest.mark.parametrize(("command", "init_from", "width"), [
  ("train", (), 192), ("run", (), 192), ("run", ("--init_from=none",), 128),
])  # fmt: skip
def test_print_config_prints_the_model_of_the_base_that_a_run_has(
  command, init_from, width, tmp_path
):
  result = cm3leon(command, "--config=own", *init_from, "--print_config", cwd=tmp_path)
  assert f"model.width = {width}  # default: 4096" in result.stdout.splitlines(), result.stderr


def test_report_lists_what_has_not_run(tmp_path):
  (tmp_path / "raw").mkdir()
  done = {"config": {}, "summary": {}, "seconds": 1.0, "id": "1"}
  (tmp_path / "raw" / "done.json").write_text(json.dumps(done))
  changed = "--config.raw.source=my images"
  flags = f"--config={SCENES}:2", changed, f"--workdir={tmp_path}"
  result = launch("report", *flags, imported=SLOW)
  assert result.returncode == 0, result.stderr
  assert "not run" in result.stdout
  page = html.unescape((tmp_path / "report.html").read_text())
  assert f"cm3leon run --config={SCENES}:2 '{changed}' --workdir=DIR" in page
