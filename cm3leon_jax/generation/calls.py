"""Makes tasks from the arguments of `CM3Leon`'s methods and from requests."""

import dataclasses
import os
from typing import Any

from cm3leon_jax.config.build import build
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.tasks import Task


def expanded(image: Any) -> Any:
  """Returns an image as tasks take it: a path becomes a string, without `~`."""
  return os.path.expanduser(os.fspath(image)) if isinstance(image, str | os.PathLike) else image


def rows(**inputs: Any) -> tuple[bool, list[dict]]:
  """Distributes the inputs of a call over its tasks.

  Each value in `inputs` is one input or a list of inputs. A box may also be a list of numbers.
  Returns (True if no input is a list, the inputs of each task).

    rows(image="a.png", prompt=["x", "y"])
    (False, [{"image": "a.png", "prompt": "x"}, {"image": "a.png", "prompt": "y"}])

  Raises:
    UserError: lists have different lengths.
  """
  box = inputs.get("box")
  if isinstance(box, list) and not (box and isinstance(box[0], list | tuple)):
    inputs["box"] = tuple(box)
  lengths = {name: len(value) for name, value in inputs.items() if isinstance(value, list)}
  if len(set(lengths.values())) > 1:
    listed = " and ".join(f"{name} of {n}" for name, n in lengths.items())
    raise UserError(f"lists have different lengths: {listed}.")
  count = next(iter(lengths.values()), 1)
  chosen = [
    {name: value[i] if name in lengths else value for name, value in inputs.items()}
    for i in range(count)
  ]
  for row in chosen:
    for name in ("prompt", "text"):
      if not isinstance(row.get(name, ""), str):
        raise UserError(f"{name} is {short(row[name])}; it must be a text or a list of texts.")
    row |= {"image": expanded(row["image"])} if "image" in row else {}
    row |= {"box": tuple(row["box"])} if "box" in row else {}
  return not lengths, chosen


def tasks(
  name: str,
  defaults: SamplingConfig,
  seed: int,
  settings: dict[str, Any],
  inputs: dict[str, Any],
  **fields: int | None,
) -> tuple[bool, list[Task]]:
  """Makes the tasks of one method call.

  Task i has the seed `seed` + i. `settings` override `defaults`. Each value in `inputs` is one
  input or a list. `fields` are integers that all tasks share; None means the default of the task.
  Returns (True if no input is a list, tasks).

  Raises:
    UserError: a value is wrong, or a task does not use a setting that is given.
  """
  cls = prompt_file.task_class(name)
  if foreign := [field for field in settings if field not in cls.settings]:
    used = ", ".join(cls.settings)
    raise UserError(f"task {name} has no setting '{foreign[0]}'; its settings are {used}.")
  config = build(SamplingConfig, {**dataclasses.asdict(defaults), **settings}, "sampling")
  shared: dict[str, Any] = {field: value for field, value in fields.items() if value is not None}
  for field, value in {"seed": seed, **shared}.items():
    if not hasattr(value, "__index__"):
      raise UserError(f"{field} is {short(value)}; it must be a whole number.")
  single, chosen = rows(**inputs)
  made = [
    cls(**row, **shared, seed=seed + i, sampling=config, row=i) for i, row in enumerate(chosen)
  ]
  for task in made:
    task.validate()
    for field in task.unread_settings():
      if field in settings:
        raise UserError(
          f"{field} is given, which task {name} does not read here, with the method "
          f"{config.method} and the prompt {task.prompt!r}."
        )
  return single, made
