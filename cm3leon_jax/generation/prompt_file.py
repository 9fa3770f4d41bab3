"""Makes tasks from flags, or from a file with one task per line."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from etils import epath

from cm3leon_jax.config.build import build
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.sources.image_folder import BY_FLAG, ImageFolder
from cm3leon_jax.data.sources.lines import json_lines
from cm3leon_jax.data.sources.records import Rejected
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.generation import image_tasks, text_tasks
from cm3leon_jax.generation.tasks import Task

# All task classes. Only base classes have no `name`.
TASKS = tuple(
  value
  for module in (image_tasks, text_tasks)
  for value in vars(module).values()
  if isinstance(value, type) and issubclass(value, Task) and "name" in vars(value)
)
# Fields that a line may have in addition to those of SamplingConfig.
FIELDS = dict.fromkeys(("task", "prompt", "image"), str) | {"box": list, "keep_neighbors": bool}
FIELDS |= dict.fromkeys(("length", "seed", "retrieve"), int)


def task_class(name: str, where: str = "") -> type[Task]:
  """Returns the class of a task. Raises UserError if `name` is unknown."""
  found = next((cls for cls in TASKS if cls.name == name), None)
  if found is None:
    names = ", ".join(cls.name for cls in TASKS)
    raise UserError(f"{where}task is '{name}'; it must be one of {names}.")
  return found


def make_task(name: str, fields: dict, **common: Any) -> Task:
  """Makes a task and validates it.

  Empty values in `fields` are ignored.

  Raises:
    UserError: the task is unknown, does not have a field, or is rejected by `Task.validate`.
  """
  where = common.get("where", "")
  cls = task_class(name, f"{where}: " if where else "")
  taken = {field.name for field in dataclasses.fields(cls)}
  task = cls(**{k: v for k, v in fields.items() if k in taken}, **common)
  for field, value in fields.items():
    if value and field not in taken:
      raise task.error(f"task {name} takes no {field}, but {short(value)} is given.")
  task.validate()
  return task


def pair(prompts: Sequence[str], images: Sequence[str]) -> list[dict]:
  """Pairs prompts with images. If there is only one prompt or only one image, it is used for all.

  Raises:
    UserError: there are different numbers of prompts and images, e.g. two and three.
  """
  count = max(len(prompts), len(images), 1)
  if any(len(values) not in (0, 1, count) for values in (prompts, images)):
    raise UserError(
      f"{len(prompts)} prompts and {len(images)} images are given: give equal numbers of both, or "
      "only one prompt or one image."
    )
  pairs: list[dict] = [{} for _ in range(count)]
  for name, values in (("prompt", prompts), ("image", images)):
    for i, fields in enumerate(pairs if values else []):
      fields[name] = values[i if len(values) > 1 else 0]
  return pairs


def read(
  path: epath.PathLike,
  task: str = "text_to_image",
  seed: int = 0,
  sampling: SamplingConfig | None = None,
  allow_outside: bool = False,
  neighbors: int | None = None,
  **defaults: Any,
) -> list[Task]:
  """Reads one task from each line of a JSONL file. Ignores empty lines.

    {"task": "text_to_image", "prompt": "a green bell", "guidance": 5, "top_k": 64}
    {"task": "caption", "image": "photos/cat.jpg"}

  Images are paths relative to the folder of the file. With all links resolved, they must be in this
  folder.

  Args:
    task: task of the lines that do not name one.
    seed: seed of the first task; task i has seed + i, unless its line has a seed.
    sampling: default settings, which a line can override.
    allow_outside: whether images may be outside the folder.
    neighbors: largest number of documents that a task retrieves by default; None: no limit.
    **defaults: default values of fields, for the tasks that have the field.

  Raises:
    UserError: a line is not a JSON object, has an unknown field or an invalid value, or names an
      image outside the folder. The message names the file and the line.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(
      f"--prompts is {path}, which does not exist: give a file with one JSON object per line."
    )
  images = ImageFolder(os.fspath(path.parent), BY_FLAG, allow_outside)
  tasks: list[Task] = []
  for where, line in json_lines(*open_filesystem(path), []):
    if isinstance(line, Rejected):
      raise UserError(line.message)
    fields = _checked(line, where)
    name = fields.pop("task", task)
    row, cls = len(tasks), task_class(name, f"{where}: ")
    limit = cls.retrieve if neighbors is None else neighbors
    usual = {"retrieve": min(cls.retrieve, limit), **defaults}
    taken = {field.name for field in dataclasses.fields(cls)}
    fields = {k: v for k, v in usual.items() if k in taken} | fields
    common = {
      "seed": fields.pop("seed", seed + row),
      "sampling": _sampling(fields, sampling or SamplingConfig(), where),
      "row": row,
      "where": where,
    }
    if fields.get("image"):
      fields["image"] = images.find(fields["image"], where)
    if "box" in fields:
      fields["box"] = tuple(fields["box"])
    tasks.append(make_task(name, fields, **common))
  if not tasks:
    raise UserError(f"--prompts is {path}, which contains no task: write one JSON object per line.")
  return tasks


def _checked(fields: dict, where: str) -> dict:
  """Returns the fields of a line. Raises UserError for an unknown name or a wrong type."""
  known = FIELDS | dict.fromkeys((f.name for f in dataclasses.fields(SamplingConfig)), object)
  for name, value in fields.items():
    if name not in known:
      raise UserError(f"{where} has no field '{name}'; the fields are {', '.join(known)}.")
    kind = known[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise UserError(f"{where}: {name} is {short(value)}; its type must be {kind.__name__}.")
  return fields


def _sampling(fields: dict, defaults: SamplingConfig, where: str) -> SamplingConfig:
  """Moves the fields of SamplingConfig out of `fields`. Raises UserError for an invalid value."""
  names = [f.name for f in dataclasses.fields(SamplingConfig) if f.name in fields]
  own = {name: fields.pop(name) for name in names}
  try:
    return build(SamplingConfig, {**dataclasses.asdict(defaults), **own}, "line")
  except UserError as error:
    raise UserError(f"{where}: {str(error).removeprefix('config.line').lstrip('.: ')}") from error
