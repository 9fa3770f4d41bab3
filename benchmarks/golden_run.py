"""Runs commands, a script and a server for `benchmarks.golden`, with the package of a commit.

The parts use only public interfaces: commands, files, the HTTP server, the Python API. Therefore
they run with the package of any commit. Only `golden_rows.py` uses internals, to read training
rows.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from benchmarks import golden_data, golden_digests, golden_server

HERE = pathlib.Path(__file__).parent
CONFIG = "golden_config.py"
ROWS = 1_000
TIMES = ("seconds", "per_second", "time", "memory", "mfu", "goodput", "bytes_in_use")
EXPORTS = {
  "opt": (("hf",), ("hf", "--quantize=int8"), ("orbax",), ("stablehlo",)),
  "modern": (("hf",), ("hf", "--merge_ema=False", "--dtype=bfloat16"), ("stablehlo",)),
}
# This script prints digests of two samples of a model.
LOAD = """
import hashlib, json, sys
from cm3leon_jax import CM3Leon
samples = CM3Leon.load(sys.argv[1]).generate("a red square at the top left", num_samples=2, seed=0)
print(json.dumps([hashlib.sha256(sample.image.tobytes()).hexdigest() for sample in samples]))
"""
# This script writes the records that the package of an older commit draws.
RECORDS = """
import pathlib
from examples.scenes import instructions, make_instructions, options
config = options.ScenesConfig(train=200, heldout=42, bank=40, rare_objects=40)
make_instructions.write(pathlib.Path("instructions"), config, instructions.TASKS, 200, 200)
"""
# Bundles, and those exports that `CM3Leon.load` reads; the number is the index in EXPORTS.
EXPORTED = ("bundle_opt", "bundle_modern", "export_opt_0", "export_opt_2", "export_modern_0")


@dataclasses.dataclass(frozen=True)
class Place:
  """Folder in which the package of one checkout runs.

  Attributes:
    checkout: root of the source tree that contains the package.
    folder: working directory of the commands. All paths are relative to it, so no result depends on
      its location.
    before: folder of the commit's results; the part `earlier` copies runs from it.
    cache: folder of compiled programs.
  """

  checkout: pathlib.Path
  folder: pathlib.Path
  before: pathlib.Path
  cache: pathlib.Path

  @property
  def environment(self) -> dict[str, str]:
    """Environment variables of the processes that run in this folder."""
    return {
      **os.environ,
      "PYTHONPATH": os.fspath(self.checkout),
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": os.fspath(self.cache),
    }

  def python(self, *arguments: str, devices: int = 1) -> str:
    """Runs Python in the folder and returns its standard output; exits if Python fails."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**self.environment, "XLA_FLAGS": flags}
    command = [sys.executable, *arguments]
    result = subprocess.run(
      command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
      sys.exit(f"{self.checkout}: {' '.join(arguments)}:\n{result.stdout}{result.stderr}"[-4_000:])
    return result.stdout

  def cm3leon(self, name: str, workdir: str, *flags: str, variant: str = "", devices: int = 1):
    """Runs a command with a variant of golden_config.py; "" means the run's stored settings."""
    config = [f"--config={CONFIG}:{variant}"] if variant else []
    self.python("-m", "cm3leon_jax", name, f"--workdir={workdir}", *config, *flags, devices=devices)

  def digests(self, folder: str) -> dict:
    return golden_digests.of_folder(self.folder / folder)

  def losses(self, workdir: str) -> dict:
    """Returns step -> values that training logged at this step, without times."""
    lines = (self.folder / workdir / "train" / "metrics" / "metrics.jsonl").read_text()
    return {
      f"{i}: step {line.get('step')}": {k: v for k, v in line.items() if not _is_time(k)}
      for i, line in enumerate(map(json.loads, lines.splitlines()))
    }


def _is_time(name: str) -> bool:
  return any(word in name for word in TIMES)


def opt(place: Place) -> dict:
  """Runs every stage with the variant `opt`."""
  place.cm3leon("run", "opt", variant="opt")
  return place.digests("opt") | place.losses("opt")


def modern(place: Place) -> dict:
  """Runs every stage with the variant `modern`, on eight devices."""
  place.cm3leon("run", "modern", variant="modern", devices=8)
  return place.digests("modern") | place.losses("modern")


def tuned(place: Place) -> dict:
  """Tunes `modern` on instructions."""
  # The image tokenizer of `modern` is trained for a few steps only.
  flags = ["--init_from=modern", "--min_psnr=0", "--max_color_difference=0"]
  if (place.checkout / "examples" / "scenes" / "make_instructions.py").exists():
    place.python("-c", RECORDS)
  else:  # The package of an older commit draws the records, and grades the answers.
    flags.append("--records=3")
  place.cm3leon("run", "tuned", *flags, variant="tuned")
  return place.digests("tuned") | place.losses("tuned")


def rewards(place: Place) -> dict:
  """Trains `tuned` further on rewards."""
  for command in ("copy_tokenizers", "encode_instructions", "reinforce"):
    flags = () if command == "encode_instructions" else ("--init_from=tuned",)
    place.cm3leon(command, "rewards", *flags, variant="rewards")
  return place.digests("rewards") | place.losses("rewards")


def rows(place: Place) -> dict:
  """Reads the first training rows of three runs: `opt`, `modern` and `tuned`."""
  found = {}
  for run in ("opt", "modern", "tuned"):
    # Without -P, modules next to the script, such as `tokenizers`, would shadow packages.
    printed = place.python("-P", os.fspath(HERE / "golden_rows.py"), run, str(ROWS))
    found |= {f"{run}: row {row}": digest for row, digest in json.loads(printed).items()}
  return found


def tasks(place: Place) -> dict:
  """Generates samples of every task with `tuned`, in batches and one at a time."""
  found = {}
  for size in (16, 1):
    out = f"tasks_{size}"
    flags = ("--prompts=data/tasks.jsonl", f"--batch_size={size}", "--samples=2", f"--out={out}")
    place.cm3leon("generate", "tuned", *flags)
    found |= {f"batches of {size}: {name}": d for name, d in place.digests(out).items()}
  return found


def served(place: Place) -> dict:
  """Sends all requests in parallel to a server of `tuned`; returns digests of the responses."""
  command = [sys.executable, "-m", "cm3leon_jax", "serve", "--workdir=tuned", "--slots=3"]
  with golden_server.Server(command, place.folder, place.environment) as server:
    requests = golden_data.http_requests(place.folder)
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as threads:
      answers = threads.map(lambda request: server.post(*request), requests)
      return {f"{i}: {path}": a for i, ((path, *_), a) in enumerate(zip(requests, answers))}


def exports(place: Place) -> dict:
  """Writes exports in every format of EXPORTS and a bundle, of `opt` and of `modern`."""
  found = {}
  for run, choices in EXPORTS.items():
    for i, (name, *flags) in enumerate(choices):
      out = f"export_{run}_{i}"
      place.cm3leon("export", run, f"--format={name}", f"--output={out}", *flags)
      found |= {f"{out}/{file}": d for file, d in place.digests(out).items()}
    place.cm3leon("export", run, f"--bundle=bundle_{run}")
    found |= {f"bundle_{run}/{f}": d for f, d in place.digests(f"bundle_{run}").items()}
  return found


def bundled(place: Place) -> dict:
  """Generates samples for ten prompts with each of the two bundled models."""
  found = {}
  for name in ("scenes", "scenes-instruct"):
    out = f"bundled_{name}"
    place.cm3leon("generate", name, f"--prompts=data/{name}.jsonl", f"--out={out}")
    found |= {f"{name}: {file}": digest for file, digest in place.digests(out).items()}
  return found


def earlier(place: Place) -> dict:
  """Continues and evaluates the commit's runs, and samples from its exports and bundles."""
  place = dataclasses.replace(place, folder=place.folder / "earlier")
  prepare(place)
  for name in ("opt", "modern", "tuned", *EXPORTED):
    shutil.copytree(place.before / name, place.folder / name)
  for run in ("opt", "tuned"):
    place.cm3leon("train", run, "--config.train.steps=30", variant=run)
  place.cm3leon("evaluate", "opt", "--config.train.steps=30", variant="opt")
  found = {}
  for run in ("opt", "tuned"):
    found |= {f"{run}: {k}": v for k, v in place.losses(run).items()}
  found |= {f"opt/evaluation/{file}": d for file, d in place.digests("opt/evaluation").items()}
  for source in EXPORTED:
    digests = json.loads(place.python("-c", LOAD, source))
    found |= {f"{source}: sample {i}": digest for i, digest in enumerate(digests)}
  return found


# Part -> other parts whose results it reads.
NEEDS = {
  "tuned": ("modern",),
  "rewards": ("tuned",),
  "rows": ("opt", "modern", "tuned"),
  "tasks": ("tuned",),
  "served": ("tuned",),
  "exports": ("opt", "modern"),
  "earlier": ("exports", "tuned"),
}
PARTS: dict[str, Callable[[Place], dict]] = {
  part.__name__: part
  for part in (opt, modern, tuned, rewards, rows, tasks, served, exports, bundled, earlier)
}


def with_needed(names: Collection[str]) -> list[str]:
  """Adds the parts whose results the named parts read; returns all in the order in which they run.

  with_needed(["tasks"]) = ["modern", "tuned", "tasks"]
  """
  needed, waiting = set[str](), list(names)
  while waiting:
    name = waiting.pop()
    needed.add(name)
    waiting += NEEDS.get(name, ())
  return [name for name in PARTS if name in needed]


def prepare(place: Place) -> None:
  """Deletes and recreates the folder; writes the config and the inputs to it."""
  shutil.rmtree(place.folder, ignore_errors=True)
  place.folder.mkdir(parents=True)
  shutil.copy(HERE / CONFIG, place.folder)
  golden_data.write(place.folder / "data")
