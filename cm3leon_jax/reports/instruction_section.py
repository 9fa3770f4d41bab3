"""Reads the grades of instructions for the report: tables and examples with images."""

from collections.abc import Callable

from etils import epath

from cm3leon_jax.evaluation.grades.files import ANSWERS, GRADES, TITLES
from cm3leon_jax.files.json_files import read_json, read_json_lines


def read(workdir: epath.Path, image_uri: Callable) -> dict | None:
  """Returns the section of the report on graded instructions, or None if none were graded.

  `image_uri` maps the path of a PNG file to a data URI.

  Returns:
    A dict: "titles", of the columns; "rows", each {label, answers, cells, gain}; "means"; and
    "examples": task -> pairs (title, lines of answers.jsonl with their images as data URIs).
  """
  folder = epath.Path(workdir) / "grades"
  if not (folder / GRADES).exists():
    return None
  grades = read_json(folder / GRADES, dict.fromkeys(("tasks", "gains", "means", "examples"), dict))
  tasks = grades["tasks"]
  titles = [title for title in TITLES if any(title in table for table in tasks.values())]
  rows = []
  for task, table in tasks.items():
    for measure, label in (("right", task), ("kept", f"{task}, kept")):
      cells = [table.get(title, {}).get(measure) for title in titles]
      if any(cells):
        gain = grades["gains"].get(task) if measure == "right" else None
        answers = table["after"]["answers"]
        rows.append({"label": label, "answers": answers, "cells": cells, "gain": gain})
  lines = {
    (line["task"], line["row"]): line
    for line in read_json_lines(folder / ANSWERS)
    if line["column"] == "after"
  }
  examples = {
    task: [
      (title, [_shown(lines[task, i], folder, image_uri) for i in places])
      for title, places in groups
    ]
    for task, groups in grades["examples"].items()
  }
  return {"titles": titles, "rows": rows, "means": grades["means"], "examples": examples}


def _shown(line: dict, folder: epath.Path, image_uri: Callable) -> dict:
  images = {name: image_uri(folder / file) for name, file in line.get("images", {}).items()}
  return {**line, "images": images}
