"""Tests that a wrong command line prints one sentence before JAX is imported."""

import json
import os
import pathlib
import subprocess
from subprocess import CompletedProcess
import sys

import pytest

from cm3leon_jax.commands import arguments
from cm3leon_jax.commands.arguments import split
from tests.commands.commands_test import DEVICES, run
from tests.refusals import check_refused

ROOT = pathlib.Path(__file__).parents[2]
RUN = ["--config=scenes", "--workdir=."]
MISTAKES = [
  ["train", *RUN, "--workdri=x"],
  ["train", *RUN, "--steps=5"],
  ["train", *RUN, "--config.train.stepz=5"],
  ["train", "--config.seed=5", *RUN],
  ["train", "--workdir=.", "--resume_from=x"],
  ["train", "--workdir=."],
  ["train", "--config=scenes"],
  ["checkpoints", "list"],
  ["generate", "--config", "scenes", "--workdir=absent", "--prompt=bell"],
  ["serve", "--workdir=absent"],
  ["serve", "--workdir=scenes-instrct"],
  ["generate", *RUN, "--task=draw"],
  ["generate", *RUN, "--prompt=a", "red", "bell", "--samples=2"],
  ["generate", *RUN, "--rank", "yes"],
  ["export", "--workdir=scenes", "--nomerge_ema=1"],
  ["generate", "--workdir=", "--prompt=a"],
  ["export", "--workdir=scenes", f"--output={__file__}/x"],
  ["prepare_data", "--config=own", f"--workdir={__file__}/x/y"],
  ["run", "--config=scenes", "--workdir=w", "--config.train"],
  ["run", "--config=own", f"--workdir={__file__}"],
  ["train", "--config=scenes", "--workdir=scenes-instruct"],
  ["checkpoints", "lisst", "--workdir=."],
]
JOBS = [(argv, "") for argv in MISTAKES]
JOBS += [(["train", *RUN], platforms) for platforms in ("cuda", "gpu", "cpu,tpu")]
# For each job, forks a process that prints its exit code and the heavy modules it imported.
FORK = """
import gc, json, os, runpy, sys
import cm3leon_jax.commands.common  # Of all commands, and without the heavy modules.
gc.freeze()
folder, jobs = sys.argv[1], json.loads(sys.argv[2])
for number, (argv, platforms) in enumerate(jobs):
  if os.fork():
    os.wait()
    continue
  for stream in (1, 2):
    os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
  os.environ["JAX_PLATFORMS"] = platforms
  sys.modules.update(dict.fromkeys(["jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu"]))
  sys.argv = ["cm3leon", *argv]
  try:
    runpy.run_module("cm3leon_jax", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    print(end.code, sorted({"jax", "flax", "scipy", "transformers"} & set(sys.modules)))
  break
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  folder, cwd = tmp_path_factory.mktemp("printed"), tmp_path_factory.mktemp("cwd")
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", FORK, str(folder), json.dumps(JOBS)]
  subprocess.run(command, cwd=cwd, env=environment, check=True)
  return folder


def test_home_folders_are_replaced_in_paths_and_not_in_prompts(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  given = ["--workdir=~/run", "-config.raw.source=~/in", "--prompts=~/p", "--config", "~/c.py"]
  kept = ["--prompt=~/x", "--out=gs://b/~/x", "--out=./~", "~/y"]
  replaced = ["--workdir=/home/ada/run", "-config.raw.source=/home/ada/in", "--prompts=/home/ada/p"]
  assert arguments.with_homes([*given, *kept]) == [*replaced, *given[3:], *kept]


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_a_mistake_is_one_sentence_and_imports_no_jax(number, ended):
  assert (ended / f"{number}.1").read_text() == "2 []\n"
  check_refused(CompletedProcess(JOBS[number], 2, "", (ended / f"{number}.2").read_text()))


@pytest.mark.parametrize(
  ("given", "config", "others"),
  [
    (["--config=c", "-config.a.b=1", "--noconfig.a.c"],) * 2 + ([],),
    (["--config", "c", "--workdir", "w"], ["--config", "c"], ["--workdir", "w"]),
    (["--config.a.b", "-1", "--config.a.c", "--rank"], ["--config.a.b", "-1", "--config.a.c"],
     ["--rank"]),
    (["--print_config", "--configs=1", "x"], [], ["--print_config", "--configs=1", "x"]),
  ],
)  # fmt: skip
def test_flags_of_the_config_are_separated(given, config, others):
  assert split(given) == (config, others)


def test_a_platform_that_jax_cannot_use_is_one_sentence():
  result = run(sys.executable, "-c", DEVICES, "--config=scenes", JAX_PLATFORMS="moon")
  assert (result.returncode, result.stdout) == (2, "")
  sentence = "error: JAX_PLATFORMS is moon: Unable to initialize backend 'moon': "
  assert result.stderr.startswith(sentence)
  assert result.stderr.count("\n") == 1


def test_an_installed_model_and_a_bucket_are_no_absent_folders():
  for workdir in ("scenes", "gs://bucket/run", str(ROOT)):
    arguments.check_workdir(workdir, begins=False)
  arguments.check_workdir("absent", begins=True)
