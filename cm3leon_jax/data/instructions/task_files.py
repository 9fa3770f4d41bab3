"""Reads the tasks of instruction tuning from YAML files."""

from collections.abc import Sequence
import importlib.resources

from etils import epath
import yaml

from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask, make_task
from cm3leon_jax.data.sources import yaml_documents
from cm3leon_jax.errors import FieldError, UserError

TASKS = importlib.resources.files("cm3leon_jax") / "data" / "tasks"


def load_tasks(config: InstructionsConfig) -> tuple[InstructionTask, ...]:
  """Returns the tasks that a config selects.

  Raises:
    UserError: the file does not exist or has an invalid field, two tasks have the same name, or
      `config.only` names an unknown task.
  """
  found = (*(read_tasks(config.tasks) if config.tasks else ()), *config.own_tasks)
  names = [task.name for task in found]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"config.instructions has two tasks with the name '{twice[0]}': rename one.")
  if unknown := sorted(set(config.only) - set(names)):
    raise UserError(
      f"config.instructions.only names '{unknown[0]}'; the tasks are {', '.join(names)}."
    )
  return tuple(task for task in found if task.name in (config.only or names))


def shipped() -> list[str]:
  """Returns the names of the task tables in the package."""
  return sorted(x.name.removesuffix(".yaml") for x in TASKS.iterdir() if x.name.endswith(".yaml"))


def read_tasks(name_or_path: str) -> tuple[InstructionTask, ...]:
  """Reads a list of tasks from a YAML file, or from a task table of the package.

  Raises:
    UserError: the file does not exist, is not valid YAML or has an invalid field. The message names
      the file and the line.
  """
  if name_or_path in shipped():
    return parse_tasks((TASKS / f"{name_or_path}.yaml").read_text(), name_or_path)
  path = epath.Path(name_or_path)
  if not path.exists() or path.is_dir():
    raise UserError(
      f"config.instructions.tasks is '{name_or_path}'; it must be an existing YAML file or one of "
      f"{', '.join(shipped())}."
    )
  return parse_tasks(yaml_documents.read(path), name_or_path)


def parse_tasks(text: str, where: str) -> tuple[InstructionTask, ...]:
  """Builds the tasks of a YAML text. `where` is the name of the text in messages.

  Raises:
    UserError: the text is not a YAML list of tasks, a field is invalid, or two tasks have the same
      name. The message names the line.
  """
  documents = yaml_documents.parse(text, where)
  if len(documents) > 1:
    line = documents[1][0].start_mark.line + 1
    raise UserError(
      f"{where}, line {line}: a second YAML document begins; a file of tasks must have one."
    )
  if not documents or not isinstance(documents[0][1], list) or not documents[0][1]:
    raise UserError(f"{where} must be a list of tasks, each `- name: ...` and other fields.")
  [(node, values)] = documents
  found: list[InstructionTask] = []
  lines: dict[str, int] = {}
  for entry, value in zip(node.value, values, strict=True):
    try:
      _check_keys(entry)
      task = make_task(value)
      if task.name in lines:
        message = (
          f"the task in line {lines[task.name]} has the same name '{task.name}': rename one."
        )
        raise FieldError(message, ("name",))
    except FieldError as error:
      raise UserError(f"{where}, line {_line_of(entry, error.path)}: {error}") from error
    lines[task.name] = _line_of(entry, ("name",))
    found.append(task)
  return tuple(found)


def _check_keys(node: yaml.Node) -> None:
  """Raises FieldError if a task has a field twice. YAML would keep only the last value."""
  keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
  if twice := [key for key in keys if keys.count(key) > 1]:
    raise FieldError(
      f"the task has the field '{twice[0]}' twice: leave one out, or begin a new task with '- '.",
      (twice[0],),
    )


def _line_of(node: yaml.Node, path: Sequence[str | int]) -> int:
  """Returns the line number, from 1, of a field or else of its nearest enclosing node."""
  line = node.start_mark.line
  for part in path:
    if isinstance(node, yaml.MappingNode):
      # If a key occurs twice, report the line of the last occurrence.
      inner = [pair for pair in node.value if pair[0].value == part][-1:]
    else:
      items = node.value if isinstance(node, yaml.SequenceNode) else []
      inner = [(item, item) for place, item in enumerate(items) if place == part]
    if not inner:
      break
    [(key, node)] = inner
    line = key.start_mark.line
  return line + 1
