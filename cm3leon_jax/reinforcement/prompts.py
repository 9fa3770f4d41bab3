"""Reads the prompts of `cm3leon reinforce`: records of tasks whose target is an image."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import itertools
import sys
from typing import NamedTuple

from cm3leon_jax.config.instructions import InstructionTask
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.given_images import load_image
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.generation.tasks import PromptLayout, has_image

OVERDRAW = 20  # Held-out records that are read per wanted prompt, since many prompts occur twice.


class Prompt(NamedTuple):
  """Task and record for which the policy draws images."""

  task: InstructionTask
  record: Record


def image_tasks(settings: Settings) -> list[InstructionTask]:
  """Returns the tasks of `config.reinforce`. Raises UserError if one is unknown."""
  tasks = {task.name: task for task in load_tasks(settings.instructions)}
  for name in settings.reinforce.tasks:
    if name not in tasks:
      raise UserError(
        f"config.reinforce.tasks names '{name}'; config.instructions has {', '.join(tasks)}."
      )
  return [tasks[name] for name in settings.reinforce.tasks]


def read_prompts(settings: Settings, layout: PromptLayout, count: int) -> list[Prompt]:
  """Reads the first training records of the tasks of `config.reinforce`, alternating between them.

  Skips records that are too long for the model. Returns at most `count` prompts.

  Raises:
    UserError: a task has no records that fit, or its target is not an image; see also
      `image_tasks`.
  """
  tasks = image_tasks(settings)
  each = -(-count // len(tasks))
  columns = []
  for task in tasks:
    records = list(itertools.islice(_records(settings, task, "train"), each))
    columns.append([Prompt(task, record) for record in records if _fits(task, record, layout)])
    if not columns[-1]:
      raise UserError(
        f"config.reinforce.tasks names '{task.name}', whose {len(records)} records are all longer "
        f"than the {layout.positions} positions of the model."
      )
  return _in_turns(columns)[:count]


def read_heldout(
  settings: Settings, layout: PromptLayout, count: int, known: Sequence[Prompt] = ()
) -> list[Prompt]:
  """Reads held-out prompts as `read_prompts` does, but none with the digest of a `known` prompt.

  All prompts differ from each other. The image of a held-out record is in no training record, but
  a caption such as "a bell" occurs in both.

  Raises:
    UserError: as `read_prompts`, or all held-out prompts of a task are known.
  """
  tasks, seen = image_tasks(settings), {digest(prompt) for prompt in known}
  each = -(-count // len(tasks))
  columns = []
  for task in tasks:
    task = dataclasses.replace(task, heldout_records=OVERDRAW * each)
    column: list[Prompt] = []
    for record in _records(settings, task, "heldout"):
      prompt = Prompt(task, record)
      if _fits(task, record, layout) and (key := digest(prompt)) not in seen:
        seen.add(key)
        column.append(prompt)
      if len(column) == each:
        break
    if not column:
      raise UserError(
        f"config.reinforce.tasks names '{task.name}', whose held-out records are all prompts of "
        f"training records too, or longer than the {layout.positions} positions of the model."
      )
    columns.append(column)
  return _in_turns(columns)[:count]


def digest(prompt: Prompt) -> str:
  """Returns the SHA-256 digest of what the model receives: the text and the input image."""
  task = prompt_of(prompt.task, prompt.record)
  found = hashlib.sha256(task.prompt.encode())
  if has_image(task):
    found.update(load_image(task.image, None).tobytes())
  return found.hexdigest()


def _records(settings: Settings, task: InstructionTask, split: str) -> Iterator[Record]:
  """Yields the records of a task, after checking that the target of the first is an image."""
  # `max_records` limits how many records are encoded. The records here are only read.
  config = dataclasses.replace(settings.instructions, max_records=0)
  records = sources.open_task(task, split, config)
  first = next(records, None)
  if first is None or task.target not in first.images:
    reason = "its target is not an image" if first else f"it has no records of split {split}"
    raise UserError(f"config.reinforce.tasks names '{task.name}', but {reason}.")
  return itertools.chain([first], records)


def _fits(task: InstructionTask, record: Record, layout: PromptLayout) -> bool:
  unlimited = dataclasses.replace(layout, positions=sys.maxsize)
  return prompt_of(task, record).to_request(unlimited).positions <= layout.positions


def _in_turns(columns: Sequence[Sequence[Prompt]]) -> list[Prompt]:
  turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
  return [prompt for prompt in turns if prompt is not None]
