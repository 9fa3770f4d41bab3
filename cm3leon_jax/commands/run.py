"""Runs all stages of a config in order and writes the report; the same command continues a run.

  cm3leon run --config=scenes --workdir=workdir/scenes
  cm3leon run --config=scenes_instruct --workdir=workdir/tuned \\
    --init_from=scenes
  cm3leon run --config=own --config.raw.source=my_images \\
    --init_from=scenes --workdir=workdir/mine

Finished stages are skipped, and a stage that was stopped or killed continues. Each stage runs in a
separate process. When a stage ends, the command prints one line; logs/NAME.log in the workdir has
the full output of the stage. With --init_from, tokenizers and CLIP are copied from that run, and
the decoder starts from its parameters. With the config `own`, the run then has the model of that
run, and measures what it forgets (docs/finetune.md).
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax.commands import common
from cm3leon_jax.commands.grade_instructions import RECORDS
from cm3leon_jax.commands.init_from_flag import INIT_FROM, OWN_IMAGE_TOKENIZER
from cm3leon_jax.commands.stage_process import StageProcesses
from cm3leon_jax.commands.tokenizer_check import LIMITS
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.runs import from_data, stages, table

if TYPE_CHECKING:
  from etils import epath

  from cm3leon_jax.settings import Settings

# Flags that some stages do not accept.
OWN_FLAGS = [x.name for x in (INIT_FROM, RECORDS, OWN_IMAGE_TOKENIZER, *LIMITS)]
STARTED = ("copy_tokenizers", "train")  # Commands that take --init_from.
# Share of each stage in the time of a run, for the configs that train for minutes. Other stages
# take 1% each.
SHARES = {"train_vqgan": 0.12, "train_clip": 0.07, "build_neighbors": 0.02, "train": 0.6}
SHARES |= {"generate": 0.03, "evaluate": 0.06, "grade_instructions": 0.2}
# Matches lines of a progress bar, and the counts that `prepare_data` also prints as a sentence.
HIDDEN = re.compile(r"\d%\||^prepare_data: shards \d")
SHOWN = re.compile(r"(\w+: )?warning|reconstructions:", re.IGNORECASE)
LEAST_KNOWN = 0.1  # The remaining time is estimated after this share of the run.


def commands(settings: Settings, given: bool, own_images: bool = False) -> dict[str, str]:
  """Maps each command of a whole run, in order, to the folder that it owns ("" if none).

  If `given`, the run starts from another run and copies its tokenizers and CLIP; if `own_images`,
  it trains its own image tokenizer.
  """
  from cm3leon_jax.data.instructions.task_files import load_tasks
  from cm3leon_jax.evaluation.world import of_answers

  names = table.order(settings, given, own_images)
  # Grades need a task whose answers can be judged exactly.
  if "grades" in names and not any(map(of_answers, load_tasks(settings.instructions))):
    names.remove("grades")
  found = {"copy_tokenizers": ""} if given else {}
  found |= {table.STAGES[name].command: name for name in names}
  return {**found, "report": ""}


def passed_on(argv: list[str]) -> list[str]:
  """Returns the arguments without the flags that some stages do not accept.

  passed_on(["--config=c", "--init_from=scenes", "--records", "9", "--workdir=w"]) = ["--config=c",
  "--workdir=w"]
  """
  kept, rest = [], list(argv)
  while rest:
    argument = rest.pop(0)
    name, is_whole, _ = argument.lstrip("-").partition("=")
    if name.removeprefix("no") not in OWN_FLAGS:
      kept.append(argument)
    elif not is_whole and name.removeprefix("no") != OWN_IMAGE_TOKENIZER.name:
      rest.pop(0)
  return kept


def seconds_left(seconds: dict[str, float], remaining: list[str]) -> float | None:
  """Estimates the remaining seconds from the finished commands. None if it is too early.

  seconds_left({"train_vqgan": 200.0}, ["train"]) = 1000.0, because `SHARES` of these commands are
  0.12 and 0.6.
  """
  known, ahead = (sum(SHARES.get(n, 0.01) for n in names) for names in (seconds, remaining))
  if known < LEAST_KNOWN * (known + ahead):
    return None
  return sum(seconds.values()) * ahead / known


def _duration(seconds: float) -> str:
  return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class _Lines:
  """Prints a stage's important output lines; in a terminal, also shows the latest other line."""

  def __init__(self, head: str, command: str):
    self._head = f"{head} {command}: "
    self._whole = command in ("prepare_data", "measure_forgetting", "report")
    self._draws = sys.stdout.isatty()

  def show(self, line: str) -> None:
    """Prints warnings, and all lines of `prepare_data` and `report`.

    In a terminal, each other line overwrites the previous line.
    """
    said = self._whole and not HIDDEN.search(line)
    said = said and not line.startswith("error: ")  # The error that ends the run is printed later.
    if said or SHOWN.match(line):
      self.clear()
      print(f"  {line}", flush=True)
    elif self._draws:
      width = shutil.get_terminal_size().columns
      sys.stdout.write(f"\r\x1b[2K{(self._head + line)[: width - 1]}")
      sys.stdout.flush()

  def clear(self) -> None:
    """Erases the line that `show` may overwrite."""
    if self._draws:
      sys.stdout.write("\r\x1b[2K")


def main(
  settings: Settings, workdir: epath.Path, init_from: str, own_images: bool, more: dict[str, list]
) -> None:
  """Runs all stages.

  `own_images` is the value of --own_image_tokenizer. `more` has the flags that only one command
  takes.
  """
  from cm3leon_jax.trained import base_documents

  if own_images and not init_from:
    raise UserError("--own_image_tokenizer is given without --init_from, which it belongs to.")
  base_documents.check_limit(settings)
  names = commands(settings, bool(init_from), own_images)
  order, given = list(names), passed_on(sys.argv[1:])
  more = {**more, **{name: [f"--init_from={init_from}"] for name in STARTED if init_from}}
  if own_images:
    more["copy_tokenizers"].append("--own_image_tokenizer")
  processes, seconds = StageProcesses(workdir / "logs"), {}
  for number, name in enumerate(order, 1):
    start, lines = time.monotonic(), _Lines(f"[{number}/{len(order)}]", name)
    try:
      processes.run(name, [*given, *more.get(name, [])], lines.show)
    finally:
      lines.clear()
    took = time.monotonic() - start
    seconds[name] = max(took, _recorded(workdir, names[name]))
    left = seconds_left(seconds, order[number:])
    estimate = f", about {_duration(left)} left" if left and order[number:] else ""
    print(f"[{number}/{len(order)}] {name}: {took:.0f} s{estimate}", flush=True)


def _recorded(workdir: epath.Path, folder: str) -> float:
  """Returns the recorded run time of a finished stage in seconds; 0.0 if it has no folder."""
  done = workdir / folder / stages.DONE
  return float(read_json(done, {}).get("seconds", 0.0)) if folder and done.exists() else 0.0


def _main(settings: Settings, workdir: epath.Path) -> None:
  init_from, own_images = INIT_FROM.value, OWN_IMAGE_TOKENIZER.value
  if init_from and from_data.missing(flags.FLAGS.config):
    from cm3leon_jax.trained import base_documents

    settings = common.completed(workdir, True, base_documents.fields(init_from, own_images))
  more = {"grade_instructions": [f"--records={RECORDS.value}"]}
  limits = [f"--{x.name}={x.value}" for x in LIMITS if not flags.FLAGS[x.name].using_default_value]
  more |= dict.fromkeys(("encode_documents", "encode_instructions"), limits)
  main(settings, workdir, init_from, own_images, more)


if __name__ == "__main__":
  common.run(_main, prepares=True)
