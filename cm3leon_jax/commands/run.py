"""Runs all stages of a config in order and writes the report; the same command continues a run.

  cm3leon run --config=examples/scenes/config.py --workdir=workdir/scenes
  cm3leon run --config=examples/scenes/instruct.py --workdir=workdir/tuned \\
    --init_from=scenes
  cm3leon run --config=own --config.raw.source=my_images --workdir=workdir/mine

Finished stages are skipped, and a stage that was stopped or killed continues. Each stage runs in a
separate process. When a stage ends, the command prints one line; logs/NAME.log in the workdir has
the full output of the stage. With --init_from or `train.base` in the config, tokenizers and CLIP
are copied from that run, and the decoder starts from its parameters. With the config `own`, the run
then has the model of that run, and measures what it forgets (docs/tuning.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import itertools
import re
import shutil
import sys
import time

from etils import epath, epy

from cm3leon_jax.commands import common, shared_flags
from cm3leon_jax.commands.stage_process import StageProcesses
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.run import pace
from cm3leon_jax.stages import from_data, stages, table

with epy.lazy_imports():
  from cm3leon_jax.data.raw import ingest
  from cm3leon_jax.run import base_documents

LIMITS = ("min_psnr", "max_color_difference")
STARTED = ("copy_tokenizers", "train")  # Commands that take --init_from.
# Matches lines of a progress bar, and the counts that `prepare_data` also prints as a sentence.
HIDDEN = re.compile(r"\d%\||^prepare_data: shards \d")
SHOWN = re.compile(r"(\w+: )?warning|reconstructions:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.InitFrom, shared_flags.Limits):
  """Flags of the run; it passes the limits to the commands that encode images."""


def commands(settings: Settings, given: bool, own_images: bool = False) -> dict[str, str]:
  """Maps each command of a whole run, in order, to the folder that it owns ("" if none).

  If `given`, the run starts from another run and copies its tokenizers and CLIP; if `own_images`,
  it trains its own image tokenizer.
  """
  names = table.order(settings, given, own_images)
  result = {"copy_tokenizers": ""} if given else {}
  result |= {table.STAGES[name].command: name for name in names}
  return {**result, "report": ""}


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


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  """Runs all stages, after a check that the source exists.

  If the config or a flag sets `train.minutes`, and neither sets `train.steps`, the decoder takes
  the steps that fit into them.
  """
  init_from = common.parent_of(settings.train.base, flags.init_from)
  own_images = flags.own_image_tokenizer
  if own_images and not init_from:
    raise UserError("--own_image_tokenizer is given without --init_from, which it belongs to.")
  base_documents.check_limit(settings)
  names = commands(settings, bool(init_from), own_images)
  if "prepare_data" in names and not (workdir / "raw" / stages.DONE).exists():
    with contextlib.redirect_stdout(None):  # `prepare_data` prints what it finds.
      ingest.parts_of(settings.raw, str(workdir))
  order, given = list(names), [*common.config_arguments(), f"--workdir={workdir}"]
  limits = [f"--{x}={getattr(flags, x)}" for x in LIMITS if getattr(flags, x) != getattr(Flags, x)]
  more: dict[str, list] = dict.fromkeys(("encode_documents", "encode_instructions"), limits)
  more |= {name: [f"--init_from={init_from}"] for name in STARTED if init_from}
  if own_images:
    more["copy_tokenizers"].append("--own_image_tokenizer")
  timed = "train.steps" in common.open_fields() or "train.minutes" in common.changed_fields()
  processes = StageProcesses(workdir / "logs")
  begun = time.monotonic() - _spent(workdir, names)
  for number, name in enumerate(order, 1):
    start, lines = time.monotonic(), _Lines(f"[{number}/{len(order)}]", name)
    if name == "train" and timed and settings.train.minutes:
      measure = functools.partial(processes.run, name, show=lines.show)
      given += _steps_that_fit(settings, workdir, begun, [*given, *more.get(name, [])], measure)
    try:
      processes.run(name, [*given, *more.get(name, [])], lines.show)
    finally:
      lines.clear()
    print(f"[{number}/{len(order)}] {name}: {time.monotonic() - start:.0f} s", flush=True)


def _spent(workdir: epath.Path, names: Mapping[str, str]) -> float:
  """Returns the seconds of the finished stages before `train`, which are skipped now."""
  before = itertools.takewhile(lambda name: name != "train", names)
  done = [workdir / names[name] / stages.DONE for name in before]
  return sum(read_json(path, {"seconds": float})["seconds"] for path in done if path.exists())


def _steps_that_fit(
  settings: Settings,
  workdir: epath.Path,
  begun: float,
  given: list[str],
  measure: Callable[[list[str]], None],
) -> list[str]:
  """Returns flags with the number of steps that fit into `train.minutes`, unless flags give it.

  The first call of a run measures a step and prints when the run ends.
  """
  fields = {flag.removeprefix("--config.train.").partition("=")[0] for flag in given}
  if "steps" in fields:
    return []
  known = pace.read(workdir)
  if known is None or known.minutes != settings.train.minutes:
    measure([*given, f"--measure_after={time.monotonic() - begun}"])
    known = pace.read(workdir)
    assert known is not None
    end = time.localtime(time.time() + known.seconds_left)
    print(f"  {known.describe(time.strftime('%H:%M', end))}", flush=True)
  values = {"steps": known.steps, **from_data.intervals(known.steps)}
  return [f"--config.train.{name}={value}" for name, value in values.items() if name not in fields]


if __name__ == "__main__":
  common.run(main, Flags, prepares=True, starts=True)
