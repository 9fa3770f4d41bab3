"""Tunes the bundled model on instructions with adapters and in full, and compares the answers.

  python -m benchmarks.evidence.adapters --conditions=full,rank_4,rank_16 --rates=1,2,4

All runs start from the bundled model `scenes`, with the config instruct.py of the demo, the same
rows in the same order, and without replay. The records must be in workdir/scene_instructions (see
that config). The program trains each condition with several learning rates. It grades and measures
only the run with the lowest held-out loss: its answers to held-out records, which are compared with
those of the full training record by record, and what it forgot of `scenes`. The intervals cover the
choice of the records, not the seed of the training. A stopped command continues where it stopped.
results.json and table.md contain the results.
"""

from collections import Counter
from collections.abc import Sequence
import pathlib
import subprocess
import sys

from absl import app, flags
import numpy as np

from benchmarks.evidence.experiment import (
  ROOT,
  chosen_conditions,
  link_stages,
  run_stage,
  write_results,
)
from cm3leon_jax.evaluation.intervals import mean_interval
from cm3leon_jax.files.json_files import read_json, read_json_lines
from examples.scenes.judge.grade_files import ANSWERS

CONFIG, BASE = "examples/scenes/instruct.py", "scenes"
SHARED = ("text_tokenizer", "vqgan", "clip", "instructions")
RANKS = {"full": 0, "rank_1": 1, "rank_4": 4, "rank_16": 16, "rank_64": 64}
FULL_RATE = 2.5e-3  # Learning rate of the config.
DATA = {"instructions.replay_share": 0.0, "data.base_documents": 4_000, "data.base_share": 0.0}

_CONDITIONS = flags.DEFINE_list("conditions", ["full", "rank_16"], f"Some of {', '.join(RANKS)}.")
_STEPS = flags.DEFINE_integer("steps", 320, "Training steps of each run.", lower_bound=10)
_RECORDS = flags.DEFINE_integer("records", 100, "Held-out records per task.", lower_bound=2)
_RATES = flags.DEFINE_list(
  "rates", ["1", "2", "4"], "Learning rates of adapters, relative to that of the config."
)
_FULL_RATES = flags.DEFINE_list("full_rates", ["0.4", "1"], "The same for the full training.")
_WORKDIR = flags.DEFINE_string("workdir", "workdir/adapters", "Folder of the runs.")


def _command(name: str, workdir: pathlib.Path, overrides: dict, *more: str) -> None:
  """Runs a command of the package, or a script of the demo; exits if it fails."""
  module = name if "." in name else f"launch.{name}"
  command = [sys.executable, "-m", module, f"--config={CONFIG}", f"--workdir={workdir}"]
  command += [f"--config.{field}={value}" for field, value in overrides.items()]
  if code := subprocess.run([*command, *more], cwd=ROOT, check=False).returncode:
    sys.exit(code)


def _trained(workdir: pathlib.Path, condition: str, rate: str) -> pathlib.Path:
  """Trains the run of a condition, unless it is finished. Returns its folder."""
  shared, rank = workdir / "shared", RANKS[condition]
  if not (shared / "vqgan" / "done.json").exists():
    _command("copy_tokenizers", shared, DATA, f"--init_from={BASE}")
  run_stage("encode_instructions", CONFIG, shared, DATA)
  run = workdir / f"{condition}_rate_{rate}_steps_{_STEPS.value}"
  link_stages(shared, run, SHARED)
  _command("train", run, _fields(rank, rate), f"--init_from={BASE}")
  return run


def _fields(rank: int, rate: str) -> dict:
  fields = {**DATA, "train.steps": _STEPS.value, "train.sample_every": 1_000_000}
  fields |= {"train.tensorboard": False, "train.checkpoint_every": max(10, _STEPS.value // 8)}
  return fields | {"adapter.rank": rank, "optimizer.learning_rate": FULL_RATE * float(rate)}


def _loss(run: pathlib.Path) -> float:
  return read_json(run / "train" / "done.json")["summary"]["heldout_loss"]


def _measured(workdir: pathlib.Path, condition: str) -> tuple[pathlib.Path, str]:
  """Trains a condition, and measures the run of the best rate. Returns its folder and its rate."""
  rates = _RATES.value if RANKS[condition] else _FULL_RATES.value
  runs = {rate: _trained(workdir, condition, rate) for rate in rates}
  best = min(runs, key=lambda rate: _loss(runs[rate]))
  for rate, run in runs.items():
    print(f"{condition}, rate {rate}: held-out loss {_loss(run):.4f}", flush=True)
  fields = _fields(RANKS[condition], best)
  _command("examples.scenes.grade", runs[best], fields, f"--records={_RECORDS.value}")
  run_stage("measure_forgetting", CONFIG, runs[best], fields)
  return runs[best], best


def rights(run: pathlib.Path, column: str) -> dict[tuple[str, int], tuple[str, float]]:
  """Returns (task, row) -> (key of the record, 1 if the answer is right, else 0)."""
  lines = read_json_lines(run / "grades" / ANSWERS)
  return {
    (line["task"], line["row"]): (line["key"], float(line["right"]))
    for line in lines
    if line["column"] == column
  }


def compare(first: dict, second: dict) -> dict:
  """Compares the answers of two columns to the same records, with equal weight of each task.

  Returns the means over tasks of both columns, and the interval of the difference, second - first.
  """
  places = sorted(first)
  if places != sorted(second):
    raise ValueError("the two columns answer different records.")
  counts = Counter(task for task, _ in places)
  weights = np.array([1 / counts[task] / len(counts) for task, _ in places])
  a, b = (np.array([column[place][1] for place in places]) for column in (first, second))
  keys = [first[place][0] for place in places]
  found = mean_interval(weights * (b - a), weights, keys)
  means = {"first": float((weights * a).sum()), "second": float((weights * b).sum())}
  return {**means, "difference": found}


def _size(run: pathlib.Path) -> int:
  newest = max((run / "train" / "checkpoints").iterdir(), key=lambda path: int(path.name))
  return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def table(results: dict) -> str:
  """Formats the results as a Markdown table."""
  titles = ("trained", "rate", "trained parameters", "checkpoint, MB", "held-out loss")
  titles += ("correct, mean over tasks", "minus full training, points")
  titles += ("bits per image code of the base", "correct captions of the base")
  lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
  for name, row in results.items():
    gap, bits, judged = "-", row["forgotten"]["image"], row["forgotten"]["correct"]
    if difference := row.get("versus_full"):
      low, high = (f"{100 * difference[side]:+.1f}" for side in ("low", "high"))
      gap = f"{100 * difference['mean']:+.1f} [{low}, {high}]"
    lines.append(
      f"| {name} | {row['rate']} | {row['trained']:,} | {row['bytes'] / 1e6:.2f} | "
      f"{row['loss']:.4f} | {row['right']:.1%} | {gap} | {bits['rise']:+.1%} "
      f"[{bits['low']:+.1%}, {bits['high']:+.1%}] | {judged['before']:.0%} -> "
      f"{judged['after']:.0%} [{100 * judged['low']:+.0f}, {100 * judged['high']:+.0f}] |"
    )
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
  names = chosen_conditions(argv, _CONDITIONS.value, RANKS)
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  runs = {name: _measured(workdir, name) for name in names}
  results: dict = {}
  for name, (run, rate) in runs.items():
    done = read_json(run / "train" / "done.json")
    summary, answers = done["summary"], rights(run, "after")
    found = compare(rights(run, "before"), answers)
    results[name] = {
      "rate": rate,
      "trained": summary.get("adapter_parameters", summary["parameters"]),
      "loss": summary["heldout_loss"],
      "right": found["second"],
      "before": found["first"],
      "seconds": done["seconds"],
      "bytes": _size(run),
      "forgotten": read_json(run / "forgetting" / "done.json")["summary"],
    }
    if name != "full" and "full" in runs:
      difference = compare(rights(runs["full"][0], "after"), answers)["difference"]
      results[name]["versus_full"] = difference
  write_results(workdir, {"steps": _STEPS.value, "results": results}, table(results))
  print(f"before: {results[names[0]]['before']:.1%} right\n{table(results)}")


if __name__ == "__main__":
  app.run(main)
