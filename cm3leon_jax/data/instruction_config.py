"""The config of instruction tuning, and the tasks that it names."""

from collections.abc import Mapping
import importlib.resources
from typing import Annotated, Any

from etils import epath
from pydantic import BeforeValidator, Field
import pydantic.dataclasses
import yaml

from cm3leon_jax.config import STRICT, UserError, build
from cm3leon_jax.data.instruction_samples import LossOn
from cm3leon_jax.data.instruction_tasks import InstructionTask


def _own_tasks(values: Any) -> tuple[InstructionTask, ...]:
  return tuple(
    value if isinstance(value, InstructionTask) else build(InstructionTask, value)
    for value in values
  )


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionsConfig:
  """Tasks of instruction tuning, and how they are mixed (CM3Leon, section 4); docs/instructions.md.

  Without tasks a run trains on its documents alone.
  """

  tasks: str = ""
  """YAML file of tasks, or one that comes with the package: `cm3leon`, `tutorial` or `scenes`."""
  own_tasks: Annotated[tuple[InstructionTask, ...], BeforeValidator(_own_tasks)] = ()
  """More tasks, each a dict of the fields that it has in YAML."""
  only: tuple[str, ...] = ()
  """Names of the tasks that are trained; (): all."""
  root: str = ""
  """Folder of the files of all tasks."""
  loss_on: LossOn = "all"
  """`all`: every token is a target, the instruction, too, as in the paper; `target`: the answer."""
  replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of slots that the run's documents get, as in pretraining, so that less is forgotten."""
  least_ratio: Annotated[float, Field(gt=0)] = 0.3
  """Least size of a task in the mixture, relative to the mean size (paper: 0.3)."""
  most_ratio: Annotated[float, Field(gt=0)] = 3.0
  """The largest relative size (paper: 3)."""

  @property
  def any(self) -> bool:
    """Returns whether there are tasks."""
    return bool(self.tasks or self.own_tasks)


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
  try:
    return parse_tasks(path.read_text(encoding="utf-8"), name_or_path)
  except UnicodeDecodeError as error:
    raise UserError(f"{name_or_path} is not UTF-8 text ({error}).") from error


def parse_tasks(text: str, where: str) -> tuple[InstructionTask, ...]:
  """Makes the tasks of a YAML text; `where` names it in messages."""
  try:
    node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise UserError(f"{where} is not valid YAML ({error}).") from error
  if not isinstance(values, list) or not values:
    raise UserError(f"{where} must be a list of tasks, each `- name: ...` and its other fields.")
  found = []
  for entry, task in zip(node.value, values, strict=True):
    line = f"{where}, line {entry.start_mark.line + 1}"
    if not isinstance(task, Mapping):
      raise UserError(f"{line}: a task must have fields, the first of which is `name: ...`.")
    try:
      found.append(build(InstructionTask, task))
    except UserError as error:
      sentence = str(error).removeprefix("config").removeprefix(".").removeprefix(": ")
      raise UserError(f"{line}: {sentence}") from error
  return tuple(found)
