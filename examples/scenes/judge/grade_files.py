"""Writes graded answers to files: tables, one line per answer, and the images of examples."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.evaluation.intervals import describe_share
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.writer import save_png
from examples.scenes.judge import grades
from examples.scenes.judge.grades import Answer

GRADES, ANSWERS = "grades.json", "answers.jsonl"
# Titles of columns, in the order in which tables show them.
TITLES = ("before", "after", "redrawn", "majority", "any object", "copy", "tokenizer")
EXAMPLES = 4  # Number of random examples, and of wrong examples, per task.


def write(
  folder: epath.PathLike,
  answers: Mapping[str, Mapping[str, list[Answer]]],
  settings: Settings,
) -> dict[str, Any]:
  """Writes grades.json, answers.jsonl, and the images of the examples to `folder`.

  `answers` maps the name of each task to {title of a column: answers}. All columns of a task answer
  the same records; in the column "redrawn", their input images are reconstructed.

  Returns {"tasks": {task: {title: result of `summarize`}}, "gains": {task: result of `gain` from
  "before" to "after"}, "means": result of `grades.means`}.
  """
  folder, seed = epath.Path(folder), settings.seed
  resamples = settings.evaluation.num_resamples
  tables, gains = {}, {}
  for task, columns in answers.items():
    tables[task] = {
      title: grades.summarize(columns[title], resamples, seed)
      for title in TITLES
      if title in columns
    }
    if "before" in columns:
      gains[task] = grades.gain(columns["after"], columns["before"], resamples, seed)
  result = {"tasks": tables, "gains": gains, "means": grades.means(tables)}
  examples = {task: choose(columns["after"], seed) for task, columns in answers.items()}
  with replacing(folder / ANSWERS, "w") as file:
    for task, columns in answers.items():
      for title in ("before", "after"):
        for i, answer in enumerate(columns.get(title, ())):
          shown = title == "after" and i in {i for _, some in examples[task] for i in some}
          file.write(json.dumps(_line(folder, task, title, i, answer, shown)) + "\n")
  write_json(folder / GRADES, {**result, "examples": examples})
  return result


def choose(answers: Sequence[Answer], seed: int) -> list[tuple[str, list[int]]]:
  """Chooses random answers, and the wrong answers with the highest `score`, as examples.

  Returns (title, indices into `answers`) for the random and for the wrong examples. No index occurs
  twice.
  """
  order = np.random.default_rng(seed).permutation(len(answers)).tolist()
  chosen = order[:EXAMPLES]
  wrong = [i for i in order[EXAMPLES:] if not answers[i].right]
  worst = sorted(wrong, key=lambda i: -answers[i].score)[:EXAMPLES]
  return [("chosen by the seed", chosen), ("wrong, and surest", worst)]


def _line(folder: epath.Path, task: str, title: str, i: int, answer: Answer, shown: bool) -> dict:
  """Returns the line of an answer in answers.jsonl. If `shown`, also writes the answer's images."""
  is_text = isinstance(answer.answer, str)
  line: dict[str, Any] = {
    "task": task,
    "column": title,
    "row": i,
    "key": answer.record.key,
    "prompt": answer.prompt,
    "answer": answer.answer if is_text else None,
    "right": answer.right,
    "kept": answer.kept,
    "reason": answer.reason,
    "score": round(answer.score, 4),
  }
  if shown:
    images: dict[str, Any] = {"given": answer.given, "answer": None if is_text else answer.answer}
    images["true"] = answer.true
    line["images"] = {
      name: f"examples/{task}_{i:04d}_{name}.png" for name, x in images.items() if x is not None
    }
    for name, file in line["images"].items():
      save_png(folder / file, images[name])
  return line


def describe(result: dict) -> str:
  """Formats the shares of correct answers of all tasks as text."""
  titles = [t for t in TITLES if any(t in table for table in result["tasks"].values())]
  rows = [("", titles)]
  for task, table in result["tasks"].items():
    for measure in ("right", "kept"):
      cells = [describe_share(table.get(title, {}).get(measure)) for title in titles]
      if any(cell != "-" for cell in cells):
        rows.append((task if measure == "right" else "  kept", cells))
  for kind, shares in result["means"].items():
    cells = [f"{shares[title]:.1%}" if title in shares else "-" for title in titles]
    rows.append((f"mean {kind}", cells))
  width = max(len(label) for label, _ in rows) + 2
  lines = (f"{label:<{width}}" + "".join(f"{cell:<24}" for cell in cells) for label, cells in rows)
  return "\n".join(line.rstrip() for line in lines)
