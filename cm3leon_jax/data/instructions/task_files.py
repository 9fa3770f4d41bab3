"""Reads the tasks that a config of instruction tuning names, from YAML files."""

from collections.abc import Sequence
import importlib.resources

from etils import epath
import yaml

from cm3leon_jax.config import FieldError, UserError
from cm3leon_jax.data.instructions.config import InstructionsConfig, InstructionTask, make_task
from cm3leon_jax.data.sources import yaml_documents


def load_tasks(config: InstructionsConfig) -> tuple[InstructionTask, ...]:
  """Returns the tasks that a config names.

  Raises:
    UserError: no such file, a wrong field in it, two tasks of one name, or no task of a name.
  """
  found = (*(read_tasks(config.tasks) if config.tasks else ()), *config.own_tasks)
  names = [task.name for task in found]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"config.instructions has two tasks of the name '{twice[0]}': rename one.")
  if unknown := sorted(set(config.only) - set(names)):
    raise UserError(
      f"config.instructions.only names '{unknown[0]}'; the tasks are {', '.join(names)}."
    )
  return tuple(task for task in found if task.name in (config.only or names))


def shipped() -> list[str]:
  """Returns the names of the tables of tasks that come with the package."""
  folder = importlib.resources.files("cm3leon_jax") / "data" / "tasks"
  return sorted(x.name.removesuffix(".yaml") for x in folder.iterdir() if x.name.endswith(".yaml"))


def read_tasks(name_or_path: str) -> tuple[InstructionTask, ...]:
  """Reads a YAML file, a list of tasks, by its path or by the name of one of the package.

  Raises:
    UserError: naming file and line: no YAML, or a wrong field.
  """
  if name_or_path in shipped():
    path = importlib.resources.files("cm3leon_jax") / "data" / "tasks" / f"{name_or_path}.yaml"
    return parse_tasks(path.read_text(), name_or_path)
  path = epath.Path(name_or_path)
  if not path.exists() or path.is_dir():
    raise UserError(
      f"config.instructions.tasks is '{name_or_path}'; it must be a YAML file that exists, or one "
      f"of {', '.join(shipped())}."
    )
  return parse_tasks(yaml_documents.read(path), name_or_path)


def parse_tasks(text: str, where: str) -> tuple[InstructionTask, ...]:
  """Makes the tasks of a YAML text; `where` names it in messages.

  Raises:
    UserError: naming the line: no YAML, no list of tasks, a wrong field, or a name of two tasks.
  """
  documents = yaml_documents.parse(text, where)
  if len(documents) > 1:
    line = documents[1][0].start_mark.line + 1
    raise UserError(f"{where}, line {line}: another document begins; a file of tasks has one.")
  if not documents or not isinstance(documents[0][1], list) or not documents[0][1]:
    raise UserError(f"{where} must be a list of tasks, each `- name: ...` and its other fields.")
  [(node, values)] = documents
  found: list[InstructionTask] = []
  lines: dict[str, int] = {}
  for entry, value in zip(node.value, values, strict=True):
    try:
      _check_keys(entry)
      task = make_task(value)
      if task.name in lines:
        message = (
          f"the task of line {lines[task.name]} has the name '{task.name}', too: rename one."
        )
        raise FieldError(message, ("name",))
    except FieldError as error:
      raise UserError(f"{where}, line {_line_of(entry, error.path)}: {error}") from error
    lines[task.name] = _line_of(entry, ("name",))
    found.append(task)
  return tuple(found)


def _check_keys(node: yaml.Node) -> None:
  """Raises FieldError if a field of a task is there twice: YAML would take the last one."""
  keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
  if twice := [key for key in keys if keys.count(key) > 1]:
    raise FieldError(
      f"the task has the field '{twice[0]}' twice: leave one out, or begin a new task with '- '.",
      (twice[0],),
    )


def _line_of(node: yaml.Node, path: Sequence[str | int]) -> int:
  """Returns the line of a field, or of what it is in, counted from 1."""
  line = node.start_mark.line
  for part in path:
    if isinstance(node, yaml.MappingNode):
      # The last one: of two equal keys it is the mistake.
      inner = [pair for pair in node.value if pair[0].value == part][-1:]
    else:
      items = node.value if isinstance(node, yaml.SequenceNode) else []
      inner = [(item, item) for place, item in enumerate(items) if place == part]
    if not inner:
      break
    [(key, node)] = inner
    line = key.start_mark.line
  return line + 1
