"""Tunes the bundled model on instructions with adapters and in full, and compares the answers.

  python -m benchmarks.adapters --conditions=full,rank_4,rank_16 --workdir=workdir/adapters

All runs start from the bundled model `scenes`, with the config `scenes_instruct`, the same rows in
the same order, and without replay, which would need the stages of the demo. The program grades the
answers of each run to the same held-out records, and compares them record by record. The intervals
cover the choice of the records, not the seed of the training. A stopped command continues where it
stopped. results.json and table.md contain the results. With the default steps and conditions, the
command takes about half an hour on two idle cores.
"""

from collections import Counter
from collections.abc import Sequence
import pathlib
import subprocess
import sys

from absl import app, flags
import numpy as np

from benchmarks.experiment import ROOT, chosen_conditions, link_stages, run_stage, write_results
from cm3leon_jax.evaluation.grades.files import ANSWERS
from cm3leon_jax.evaluation.intervals import mean_interval
from cm3leon_jax.files.json_files import read_json, read_json_lines

CONFIG, BASE = "ml_configs/scenes_instruct.py", "scenes"
SHARED = ("text_tokenizer", "vqgan", "clip", "instructions")
RANKS = {"full": 0, "rank_1": 1, "rank_4": 4, "rank_16": 16, "rank_64": 64}

_CONDITIONS = flags.DEFINE_list("conditions", ["full", "rank_16"], f"Some of {', '.join(RANKS)}.")
_STEPS = flags.DEFINE_integer("steps", 320, "Training steps of each run.", lower_bound=10)
_RECORDS = flags.DEFINE_integer("records", 100, "Held-out records per task.", lower_bound=2)
_RATE = flags.DEFINE_float("rate", 1.0, "Learning rate of adapters, relative to the full training.")
_WORKDIR = flags.DEFINE_string("workdir", "workdir/adapters", "Folder of the runs.")


def _command(name: str, workdir: pathlib.Path, overrides: dict, *more: str) -> None:
  """Runs a command of the package; exits if it fails."""
  command = [sys.executable, "-m", f"launch.{name}", f"--config={CONFIG}", f"--workdir={workdir}"]
  command += [f"--config.{field}={value}" for field, value in overrides.items()]
  if code := subprocess.run([*command, *more], cwd=ROOT, check=False).returncode:
    sys.exit(code)


def _trained(workdir: pathlib.Path, condition: str) -> pathlib.Path:
  """Trains and grades the run of a condition, unless it is finished. Returns its folder."""
  shared, rank = workdir / "shared", RANKS[condition]
  data = {"instructions.replay_share": 0.0}
  if not (shared / "vqgan" / "done.json").exists():
    _command("copy_tokenizers", shared, data, f"--init_from={BASE}")
  run_stage("encode_instructions", CONFIG, shared, data)
  run = workdir / f"{condition}_{_STEPS.value}"
  link_stages(shared, run, SHARED)
  fields = {**data, "train.steps": _STEPS.value, "train.sample_every": 1_000_000}
  fields |= {"train.tensorboard": False, "train.checkpoint_every": max(10, _STEPS.value // 8)}
  if rank:
    fields |= {"adapter.rank": rank, "optimizer.learning_rate": 2.5e-3 * _RATE.value}
  _command("train", run, fields, f"--init_from={BASE}")
  _command("grade_instructions", run, fields, f"--records={_RECORDS.value}")
  return run


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
  lines = [
    "| trained | trained parameters | checkpoint, MB | held-out loss | right, mean over tasks | "
    "minus full training, points |",
    "|---|---|---|---|---|---|",
  ]
  for name, row in results.items():
    difference, gap = row.get("versus_full"), "-"
    if difference:
      low, high = (f"{100 * difference[side]:+.1f}" for side in ("low", "high"))
      gap = f"{100 * difference['mean']:+.1f} [{low}, {high}]"
    lines.append(
      f"| {name} | {row['trained']:,} | {row['bytes'] / 1e6:.2f} | {row['loss']:.4f} | "
      f"{row['right']:.1%} | {gap} |"
    )
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
  names = chosen_conditions(argv, _CONDITIONS.value, RANKS)
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  runs = {name: _trained(workdir, name) for name in names}
  results: dict = {}
  for name, run in runs.items():
    done = read_json(run / "train" / "done.json")
    summary, answers = done["summary"], rights(run, "after")
    found = compare(rights(run, "before"), answers)
    results[name] = {
      "trained": summary.get("adapter_parameters", summary["parameters"]),
      "loss": summary["heldout_loss"],
      "right": found["second"],
      "before": found["first"],
      "seconds": done["seconds"],
      "bytes": _size(run),
    }
    if name != "full" and "full" in runs:
      difference = compare(rights(runs["full"], "after"), answers)["difference"]
      results[name]["versus_full"] = difference
  write_results(workdir, {"steps": _STEPS.value, "results": results}, table(results))
  print(f"before: {results[names[0]]['before']:.1%} right\n{table(results)}")


if __name__ == "__main__":
  app.run(main)
