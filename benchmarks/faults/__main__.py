"""Causes real faults, and checks whether a run loses work or data.

  python -m benchmarks.faults --workdir=workdir/faults
  python -m benchmarks.faults --part=kill --count=25

Parts:
  kill: SIGKILL at random moments of a training, an evaluation and an export.
  damage: damage to checkpoints, which are then restored in one process.

Finished results stay in the workdir, so a stopped part continues from them. Writes results.json and
table.md to the workdir. The exit code is 1 if a run lost anything, or if no message named a fault.
See docs/monitoring.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import sys
import time

from absl import app, flags

from benchmarks.faults import damage, kill, table
from cm3leon_jax.files.json_files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Part:
  """Part of the benchmark.

  Attributes:
    count: default number of faults.
    measure: (folder, seed, count) -> iterator over results; reads the results that already exist.
    summarize: results -> numbers.
    failures: numbers -> a sentence for each failure.
  """

  count: int
  measure: Callable[[pathlib.Path, int, int], Iterator[dict]]
  summarize: Callable[[list[dict]], dict]
  failures: Callable[[dict], list[str]]


PARTS = {
  "kill": Part(200, kill.measure, kill.summarize, table.kill_failures),
  "damage": Part(1_000, damage.measure, damage.summarize, table.failures),
}


def run(name: str, folder: pathlib.Path, seed: int, count: int, minutes: float) -> dict:
  """Runs a part for a limited time. Adds its numbers to results.json and returns them.

  Args:
    name: name of the part.
    folder: folder of the benchmark.
    seed: seed of all random choices.
    count: number of faults; 0 means the default of the part.
    minutes: minutes after which no new fault begins.
  """
  part, start, results = PARTS[name], time.monotonic(), []
  count = count or part.count
  for result in part.measure(folder, seed, count):
    results.append(result)
    if time.monotonic() - start > 60 * minutes:
      break
  summary = {"asked": count, "seed": seed, **part.summarize(results)}
  path = folder / "results.json"
  numbers = {**(read_json(path) if path.exists() else {}), name: summary}
  write_json(path, numbers)
  (folder / "table.md").write_text(table.markdown(numbers), encoding="utf-8")
  return summary


def main(argv) -> None:
  """Runs the requested parts."""
  args = flags.FLAGS
  if len(argv) > 1:
    print(
      f"error: unexpected argument '{argv[1]}': this command takes flags only.", file=sys.stderr
    )
    sys.exit(2)
  folder = pathlib.Path(args.workdir).resolve()
  folder.mkdir(parents=True, exist_ok=True)
  failed = False
  for name in PARTS if args.part == "all" else [args.part]:
    summary = run(name, folder, args.seed, args.count, args.minutes)
    failures = PARTS[name].failures(summary)
    failed |= bool(failures)
    for sentence in failures:
      print(f"faults: {name}: {sentence}", flush=True)
  print((folder / "table.md").read_text())
  sys.exit(int(failed))


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    "workdir", "workdir/faults", "Folder of all parts. Finished results in it are reused."
  )
  flags.DEFINE_enum("part", "all", ["all", *PARTS], "Part to run.")
  flags.DEFINE_integer("seed", 0, "Seed of all random choices.", lower_bound=0)
  flags.DEFINE_integer("count", 0, "Number of faults per part; 0: the default.", 0)
  flags.DEFINE_float("minutes", 60.0, "Minutes after which no new fault begins.", 0.0)


if __name__ == "__main__":  # Other processes import this module and must not define its flags.
  define_flags()
  app.run(main)
