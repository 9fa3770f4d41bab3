"""Mistakes in the command line end in one sentence, before JAX is imported."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from cm3leon_jax.commands import arguments
from cm3leon_jax.commands.arguments import split
from tests.commands.commands_test import DEVICES, run

ROOT = pathlib.Path(__file__).parents[2]
RUN = ["--config=scenes", "--workdir=."]
# Command line -> sentence, and variables of the environment.
MISTAKES = [
  (
    ["train", *RUN, "--workdri=x"],
    "--workdri is not a flag of this command: did you mean --workdir?",
  ),
  (
    ["train", *RUN, "--steps=5"],
    "--steps is not a flag of this command; a field of the config is set by --config.train.steps "
    "or --config.clip.steps or --config.vqgan.steps.",
  ),
  (
    ["train", *RUN, "--config.train.stepz=5"],
    "--config.train.stepz: the config has no such field; did you mean --config.train.steps?",
  ),
  (
    ["train", "--config.seed=5", *RUN],
    "--config.seed is given, but no config before it: name a config: --config=scenes",
  ),
  (
    ["train", "--workdir=.", "--resume_from=x"],
    "--resume_from is x; it must be a positive integer.",
  ),
  (["train", "--workdir=."], "name a config: --config=scenes"),
  (["train", "--config=scenes"], "name the folder of the run: --workdir=workdir"),
  (["checkpoints", "list"], "name the folder of the run: --workdir=workdir"),
  (
    ["generate", "--config", "scenes", "--workdir=absent", "--prompt=bell"],
    "there is no folder absent: name the folder of a run with --workdir; `cm3leon prepare_data` "
    "begins a run.",
  ),
  (
    ["serve", "--workdir=absent"],
    "there is no folder absent: name the folder of a run with --workdir; `cm3leon prepare_data` "
    "begins a run.",
  ),
  (
    ["serve", "--workdir=scenes-instrct"],
    "scenes-instrct is neither a folder nor a bundle: did you mean scenes-instruct?",
  ),
  (
    ["generate", *RUN, "--task=draw"],
    "--task is draw; it must be one of text_to_image, infill_image, edit, instruct, "
    "unconditional, caption, question, infill_text, interleaved.",
  ),
  (
    ["generate", *RUN, "--prompt=a", "red", "bell", "--samples=2"],
    "unexpected argument 'red': commands take flags only (--name=value); a value with spaces "
    'needs quotes: --prompt="a red bell".',
  ),
  (
    ["generate", *RUN, "--rank", "yes"],
    "unexpected argument 'yes': commands take flags only (--name=value).",
  ),
  (
    ["export", "--workdir=scenes", "--nomerge_ema=1"],
    "--nomerge_ema takes no value: write --merge_ema=1 or --nomerge_ema.",
  ),
  (
    ["generate", "--workdir=", "--prompt=a"],
    "name the folder of the run: --workdir=workdir",
  ),
  (
    ["export", "--workdir=scenes", f"--output={__file__}/x"],
    f"--output is {__file__}/x, but {__file__} is not a folder: name another path.",
  ),
  (
    ["prepare_data", "--config=own", f"--workdir={__file__}/x/y"],
    f"--workdir is {__file__}/x/y, but {__file__} is not a folder: name another path.",
  ),
  (
    ["run", "--config=scenes", "--workdir=w", "--config.train"],
    "--config.train is a section: give a field of it, such as --config.train.steps.",
  ),
  (
    ["run", "--config=own", f"--workdir={__file__}"],
    f"--workdir is {__file__}, which is a file: name a folder.",
  ),
  (
    ["train", "--config=scenes", "--workdir=scenes-instruct"],
    "scenes-instruct is a bundle, but this command needs the folder of a run: "
    "`cm3leon prepare_data` begins a run.",
  ),
  (
    ["checkpoints", "lisst", "--workdir=."],
    "the first argument must say what to do: list, verify, prune, rollback, not 'lisst'.",
  ),
]
PLATFORMS = {
  "cuda": "JAX_PLATFORMS is cuda, but JAX's plugin for cuda is not installed: pip install "
  "'jax[cuda12]' or pip install 'jax[cuda13]', or unset JAX_PLATFORMS.",
  "gpu": "JAX_PLATFORMS is gpu, but JAX's plugin for gpu is not installed: pip install "
  "'jax[cuda12]' or pip install 'jax[cuda13]', or unset JAX_PLATFORMS.",
  "cpu,tpu": "JAX_PLATFORMS is cpu,tpu, but JAX's plugin for tpu is not installed: pip install "
  "'jax[tpu]', or unset JAX_PLATFORMS.",
}
# Forks a process for each mistake, which prints its exit code and the heavy modules it imported.
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
  """Runs all mistakes from a folder; returns the folder of what they printed."""
  folder, cwd = tmp_path_factory.mktemp("printed"), tmp_path_factory.mktemp("cwd")
  jobs = [(argv, "") for argv, _ in MISTAKES]
  jobs += [(["train", *RUN], platforms) for platforms in PLATFORMS]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", FORK, str(folder), json.dumps(jobs)]
  subprocess.run(command, cwd=cwd, env=environment, check=True)
  return folder


SENTENCES = [*(sentence for _, sentence in MISTAKES), *PLATFORMS.values()]


@pytest.mark.parametrize(("number", "sentence"), list(enumerate(SENTENCES)))
def test_a_mistake_is_one_sentence_and_imports_no_jax(number, sentence, ended):
  assert (ended / f"{number}.2").read_text() == f"error: {sentence}\n"
  assert (ended / f"{number}.1").read_text() == "2 []\n"


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
