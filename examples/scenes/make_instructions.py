"""Writes the demo's instruction records, with the tasks of data/tasks.yaml, to a folder.

  python -m examples.scenes.make_instructions workdir/scene_instructions --records=3000

Each task has a folder with train.jsonl, heldout.jsonl and images/. The records are those of
`instructions.record` for the options of the config instruct.py.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib

import numpy as np
from PIL import Image
import yaml

from cm3leon_jax.config.build import build
from cm3leon_jax.data.instructions.records import Record
from examples.scenes import instruct
from examples.scenes.instructions import TASKS, record
from examples.scenes.options import ScenesConfig

TEMPLATES = pathlib.Path(__file__).parent / "data" / "tasks.yaml"


def options_of(seed: int = 0) -> ScenesConfig:
  """Returns the options of the scenes that the records show."""
  options = instruct.get_config().raw.options.to_dict()
  return build(ScenesConfig, {**options, "seed": seed}, "raw.options")


def write(
  folder: pathlib.Path, config: ScenesConfig, tasks: Sequence[str], train: int, heldout: int
) -> None:
  """Writes tasks.yaml, and the first `train` and `heldout` records of each task."""
  folder.mkdir(parents=True, exist_ok=True)
  listed = [task for task in yaml.safe_load(TEMPLATES.read_text()) if task["name"] in tasks]
  for task in tasks:
    (folder / task / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout)):
      with open(folder / task / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for index in range(count):
          one = record(config, task, split, index)
          file.write(json.dumps(_line(folder / task, one)) + "\n")
  (folder / "tasks.yaml").write_text(yaml.safe_dump(listed, sort_keys=False))


def _line(folder: pathlib.Path, one: Record) -> dict:
  """Writes the images of a record, and returns its line."""
  _, _, split, number = one.key.split("/")
  images = {name: f"images/{split}_{number}_{name}.png" for name in one.images}
  for name, file in images.items():
    Image.fromarray(np.asarray(one.images[name])).save(folder / file)
  fields = {"key": one.key, "group": one.group, "texts": dict(one.texts)}
  return {**fields, "images": images, "facts": dict(one.facts)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--records", type=int, default=3_000, help="training records per task")
  parser.add_argument("--heldout", type=int, default=200, help="held-out records per task")
  parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
  parser.add_argument("--tasks", default=",".join(TASKS), help="names of tasks, with commas")
  given = parser.parse_args()
  tasks = given.tasks.split(",")
  write(given.folder, options_of(given.seed), tasks, given.records, given.heldout)
  print(f"make_instructions: {', '.join(tasks)} are in {given.folder}")


if __name__ == "__main__":
  main()
