"""Kills all stages except training at random moments (part `stages` of `benchmarks.faults`).

Each stage runs in a new workdir with links to the results that it reads. Its process is killed with
SIGKILL up to three times, and each time it is started again with the same command. When the stage
has finished, every file and every logged number must equal the result of a run without a kill.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
from PIL import Image

from benchmarks import experiment, faults_run
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.runs.stages import DONE

CONFIG = f"{faults_run.CONFIG}:stages"
TASKS = f"{faults_run.CONFIG}:tasks"
PAIRS, LISTS, SIDE = 240, 4, 8
KILLS = 3  # Maximum number of kills per run of a stage.
# Folders: the raw data, and the workdir of a complete run that is never killed.
SOURCE, WHOLE = "source", "whole"
# Fields of logs and summaries that differ in every run.
TIMES = ("time", "seconds", "tokens_per_second", "mfu", "machine")
# Files and folders that differ in every run and are not compared. Checkpoints differ in their
# times; the metrics show whether the parameters are equal.
LEFT_OUT = ("checkpoints", "checkpoints.digests", "lease.json", "metrics.digest.json")


@dataclasses.dataclass(frozen=True)
class Stage:
  """Stage whose process is killed.

  Attributes:
    command: name of the command.
    folder: folder in the workdir that the stage writes.
    reads: folders in the workdir that the stage reads; they are links to the run in `WHOLE`.
    config: config, as "FILE:VARIANT".
    flags: more flags; {root} is replaced by the folder of the part `stages`.
  """

  command: str
  folder: str
  reads: tuple[str, ...] = ()
  config: str = CONFIG
  flags: tuple[str, ...] = ()


TOKENIZERS = ("text_tokenizer", "vqgan")
RAY = ("--runner=ray", "--ray_workers=2", "--ray_worker_cpus=0.5")
START = (f"--init_from={{root}}/{WHOLE}",)
# Name -> stage, in the order of a run that is never killed.
STAGES = {
  "prepare_data": Stage("prepare_data", "raw"),
  "train_text_tokenizer": Stage("train_text_tokenizer", "text_tokenizer", ("raw",)),
  "train_vqgan": Stage("train_vqgan", "vqgan", ("raw",)),
  "encode_documents": Stage("encode_documents", "documents", ("raw", *TOKENIZERS)),
  "encode_documents, 2 Ray workers": Stage(
    "encode_documents", "documents", ("raw", *TOKENIZERS), flags=RAY
  ),
  "train_clip": Stage("train_clip", "clip", ("raw", "text_tokenizer")),
  "build_neighbors": Stage("build_neighbors", "neighbors", ("raw", "text_tokenizer", "clip")),
  "encode_instructions": Stage("encode_instructions", "instructions", TOKENIZERS, TASKS),
  "import_weights": Stage(
    "import_weights", "init", ("raw",), flags=(f"--source={{root}}/{WHOLE}/export",)
  ),
  "reinforce": Stage(
    "reinforce", "train", (*TOKENIZERS, "clip", "instructions"), TASKS, START
  ),
}  # fmt: skip


def write_source(folder: pathlib.Path) -> None:
  """Writes striped images with captions to several folders; each folder becomes one shard."""
  rng = np.random.default_rng(0)
  for part in range(LISTS):
    (folder / f"{part}").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(part, PAIRS, LISTS):
      pixels = np.repeat(rng.integers(0, 256, (SIDE, 1, 3), np.uint8), SIDE, axis=1)
      Image.fromarray(pixels).save(folder / f"{part}" / f"{i}.png")
      words = rng.choice(list("abcdefghijklmnopqrst"), (6, 5))
      caption = " ".join("".join(word) for word in words)
      lines.append(json.dumps({"key": f"k{i}", "image": f"{i}.png", "caption": caption}) + "\n")
    (folder / f"{part}" / "pairs.jsonl").write_text("".join(lines))


def start(
  root: pathlib.Path, stage: Stage, workdir: pathlib.Path, *more: str
) -> faults_run.Process:
  """Starts the command of a stage with its flags and `more`."""
  given = [flag.format(root=root) for flag in (*stage.flags, *more)]
  if stage.command == "prepare_data":
    given.append(f"--config.raw.source={root / SOURCE}")
  return faults_run.Process.command(
    root / "process", stage.command, *given, workdir=workdir, config=stage.config
  )


def new_workdir(root: pathlib.Path, stage: Stage, name: str) -> pathlib.Path:
  """Creates a workdir with only the folders that a stage reads; deletes an earlier workdir."""
  shutil.rmtree(root / name, ignore_errors=True)
  experiment.link_stages(root / WHOLE, root / name, stage.reads)
  return root / name


def result_of(folder: pathlib.Path) -> dict:
  """Returns file name -> digest, or content without times if the file is a log."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder)
    if not path.is_file() or {*name.parts} & {*LEFT_OUT}:
      continue
    if path.name == "metrics.jsonl":
      lines = [line for line in read_json_lines(path) if not {"event", "goodput"} & {*line}]
      found[f"{name}"] = [_without_times(line) for line in lines]
    elif path.name == DONE:
      found[f"{name}"] = _without_times(read_json(path))
      if not found[f"{name}"]["files"]:
        del found[f"{name}"]["id"]  # Without files, this id depends on the time.
    else:
      found[f"{name}"] = digest(path)
  return found


def _without_times(value):
  """Removes the fields in `TIMES` from a JSON value and from the dicts in it."""
  if not isinstance(value, dict):
    return value
  return {k: _without_times(v) for k, v in value.items() if k not in TIMES}


def reference(root: pathlib.Path) -> dict[str, dict]:
  """Runs each stage twice without a kill, unless reference.json exists; returns the second results.

  Raises RuntimeError if the two runs of a stage differ.
  """
  path = root / "reference.json"
  if not path.exists():
    write_source(root / SOURCE)
    known = {}
    for name, stage in STAGES.items():
      # `import_weights` and `reinforce` read an export, so a run is trained and exported first.
      if stage.command == "import_weights":
        for command in ("train", "export"):
          process = faults_run.Process.command(
            root / "process", command, workdir=root / WHOLE, config=CONFIG
          )
          faults_run.finish(process)
      known[name] = _without_kill(root, name, stage)
    write_json(path, known)
  return read_json(path)


def _without_kill(root: pathlib.Path, name: str, stage: Stage) -> dict:
  """Runs a stage in two workdirs without killing it, and links the first result into `WHOLE`."""
  results, seconds = [], 0.0
  for number in range(2):
    workdir = new_workdir(root, stage, f"{stage.command}_{number}")
    seconds = faults_run.finish(start(root, stage, workdir))
    results.append(result_of(workdir / stage.folder))
  if different := differing(*results):
    raise RuntimeError(f"two runs of {name} without a kill differ in {', '.join(different)}.")
  made = root / WHOLE / stage.folder
  if stage.command != "reinforce" and not made.exists():
    experiment.link_stages(root / f"{stage.command}_0", root / WHOLE, (stage.folder,))
  return {"result": results[-1], "seconds": seconds}


def differing(found: dict, expected: dict) -> list[str]:
  """Returns the names of files that differ, or that only one of the two results contains."""
  names = sorted({*found, *expected})
  return [name for name in names if found.get(name) != expected.get(name)]


def control(root: pathlib.Path, known: dict) -> dict:
  """Trains the image tokenizer with a different seed, as a control: its result must differ."""
  stage = STAGES["train_vqgan"]
  workdir = new_workdir(root, stage, "control")
  faults_run.finish(start(root, stage, workdir, "--config.seed=1"))
  found = result_of(workdir / stage.folder)
  return {"differing": differing(found, known["train_vqgan"]["result"])}


def killed_run(root: pathlib.Path, name: str, rng: np.random.Generator, known: dict) -> dict:
  """Kills a stage up to `KILLS` times, then runs it to its end; compares its result."""
  stage, moments = STAGES[name], []
  workdir = new_workdir(root, stage, "killed")
  for _ in range(KILLS):
    moment = float(rng.random()) * known["seconds"]
    process = start(root, stage, workdir)
    code = process.wait(moment)
    if code is None and process.kill() is not None:
      moments.append(round(moment, 2))
      continue
    faults_run.finish(process)
    break
  faults_run.finish(start(root, stage, workdir))
  different = differing(result_of(workdir / stage.folder), known["result"])
  return {"stage": name, "moments": moments, "differing": different}


def measure(root: pathlib.Path, seed: int, count: int) -> Iterator[dict]:
  """Yields the result of the control, then of runs in which each stage is killed `count` times."""
  root = root / "stages"
  root.mkdir(parents=True, exist_ok=True)
  known = reference(root)
  yield control(root, known)
  kills = dict.fromkeys(STAGES, 0)
  for run in itertools.count():
    for number, name in enumerate(STAGES):
      if kills[name] >= count:
        continue
      path = root / f"run_{run:03d}_{number:02d}.json"
      if not path.exists():
        rng = np.random.default_rng([seed, run, number])
        write_json(path, killed_run(root, name, rng, known[name]))
      result = read_json(path)
      kills[name] += len(result["moments"])
      yield result
    if all(kills[name] >= count for name in STAGES):
      return


def summarize(runs: list[dict]) -> dict:
  """Counts, for each stage, the kills, the runs, and the runs that equal a run without a kill."""
  stages: dict[str, dict] = {}
  first, *runs = runs
  for run in runs:
    of = stages.setdefault(run["stage"], {"kills": 0, "runs": 0, "equal": 0, "differing": []})
    of["kills"] += len(run["moments"])
    of["runs"] += 1
    of["equal"] += not run["differing"]
    of["differing"] += run["differing"][:4]
  return {"stages": stages, "control_differs": bool(first["differing"])}


def failures(summary: dict) -> list[str]:
  """Returns a sentence for each failure in a summary."""
  found = [
    f"{name}: {of['runs'] - of['equal']} of {of['runs']} runs differ in "
    + ", ".join(of["differing"])
    for name, of in summary["stages"].items()
    if of["equal"] < of["runs"]
  ]
  if not summary["control_differs"]:
    found.append("the control, another seed, equals the run that was never killed")
  return found
