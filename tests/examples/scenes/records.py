"""Helpers for tests on records of instructions about scenes."""

import dataclasses
import pathlib

from cm3leon_jax.config.instructions import InstructionTask
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.task_files import read_tasks
from examples.scenes import make_instructions
from examples.scenes.instructions import record
from examples.scenes.options import ScenesConfig

TASKS = {task.name: task for task in read_tasks(str(make_instructions.TEMPLATES))}


def records(config: ScenesConfig, task: str, split: str, number: int) -> list[Record]:
  """Returns the first records of a task."""
  return [record(config, task, split, index) for index in range(number)]


def write_tasks(
  folder: pathlib.Path, names: tuple[str, ...], train: int, heldout: int
) -> tuple[InstructionTask, ...]:
  """Writes the first records of tasks to a folder, as `config.instructions.root`."""
  make_instructions.write(folder, ScenesConfig(), names, train, heldout)
  return tuple(
    dataclasses.replace(TASKS[name], records=train, heldout_records=heldout) for name in names
  )
