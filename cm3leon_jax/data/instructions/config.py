"""The config of instruction tuning, and the tasks that it names."""

from collections.abc import Mapping, Sequence
import importlib.resources
from typing import Annotated, Any

from etils import epath
from pydantic import BeforeValidator, Field, NonNegativeInt
import pydantic.dataclasses
import yaml

from cm3leon_jax.config import STRICT, FieldError, UserError, build
from cm3leon_jax.data.instructions.files import FORMATS
from cm3leon_jax.data.instructions.samples import LossOn
from cm3leon_jax.data.instructions.tasks import (
  BREAK,
  SCENES,
  InstructionTask,
  fields_of,
  split_template,
)
from cm3leon_jax.data.sources import yaml_documents


def _own_tasks(values: Any) -> tuple[InstructionTask, ...]:
  if not isinstance(values, Sequence) or isinstance(values, str):
    raise ValueError(f"it is {values!r}; it must be a tuple of tasks, each a dict of its fields.")
  found = []
  for number, value in enumerate(values, 1):
    try:
      found.append(make_task(value))
    except FieldError as error:
      raise ValueError(f"task {number}: {error}") from error
  return tuple(found)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionsConfig:
  """Tasks of instruction tuning, and how they are mixed (CM3Leon, section 4); docs/instructions.md.

  Without tasks a run trains on its documents alone.
  """

  tasks: str = ""
  """YAML file of tasks, or one that comes with the package: `cm3leon`, `tutorial` or `scenes`."""
  own_tasks: Annotated[tuple[InstructionTask, ...], BeforeValidator(_own_tasks)] = ()
  """More tasks, each a dict of the fields that it has in YAML (docs/instructions.md)."""
  only: tuple[str, ...] = ()
  """Names of the tasks that are trained; (): all."""
  root: str = ""
  """Folder of the files of all tasks."""
  allow_outside: bool = False
  """Whether records may name images outside of the folder of images of their task. Only for records
  that you trust: they could name any file of the machine."""
  max_records: NonNegativeInt = 0
  """Most records of a task that are trained on, the first ones; 0: as many as the task says."""
  redrawn: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of training records whose given images are first encoded and decoded by the image
  tokenizer, so that they look like images that a model drew."""
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
  found, lines = [], {}
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


def make_task(values: Any) -> InstructionTask:
  """Makes a task of its fields, and checks it against what is known of its format.

  Raises:
    FieldError: naming the field that is wrong.
  """
  if not isinstance(values, InstructionTask):
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
      raise FieldError("a task must have fields by their names, the first of which is `name: ...`.")
    try:
      values = build(InstructionTask, values)
    except FieldError as error:
      sentence = str(error).removeprefix("config")
      sentence = sentence[1:] if sentence.startswith(".") else f"the task{sentence}"
      raise FieldError(sentence.replace("a valid tuple", "a list"), error.path) from error
  check_format(values)
  return values


def check_format(task: InstructionTask) -> None:
  """Checks the splits and fields of a task whose format is known to have certain ones.

  Raises:
    FieldError: an unknown format or split, a split for both purposes, or a template with a field
      that the records do not have, or with an image in a text.
  """
  is_scenes = task.format.startswith(SCENES)
  if not is_scenes and task.format not in FORMATS:
    names = ", ".join([f"{SCENES}TASK", *FORMATS])
    raise FieldError(f"format is '{task.format}'; it must be one of {names}.", ("format",))
  splits = ("train", "heldout") if is_scenes else FORMATS[task.format].splits
  for field in ("train", "heldout"):
    split = getattr(task, field)
    if splits and split not in splits and (split or field == "train"):
      raise FieldError(
        f"{field} is '{split}'; format '{task.format}' has the splits {', '.join(splits)}.",
        (field,),
      )
  if task.heldout == task.train:
    raise FieldError(
      f"heldout is '{task.heldout}', which is trained on: name another.", ("heldout",)
    )
  if is_scenes:
    for field in ("records", "heldout_records"):
      if not getattr(task, field) and (task.heldout or field == "records"):
        raise FieldError(f"{field} is 0; scenes are drawn without end: set a number.", (field,))
  elif FORMATS[task.format].images:
    _check_fields(task, FORMATS[task.format].texts, FORMATS[task.format].images)


def _check_fields(task: InstructionTask, texts: tuple[str, ...], images: tuple[str, ...]) -> None:
  """Checks the fields of maps and templates against those of the records."""
  if task.maps and task.target not in images:
    raise FieldError(f"maps need an image as the target, and that is '{task.target}'.", ("maps",))
  if taken := [field for field in task.maps if field in (*texts, *images)]:
    raise FieldError(f"maps has '{taken[0]}', a field of the records: rename it.", ("maps", *taken))
  images = (*images, *task.maps)
  for place, template in enumerate(task.templates):
    for segment in split_template(template):
      for field in fields_of(segment):
        if field not in (*texts, *images):
          raise FieldError(
            f"the template '{template}' has the field {{{field}}}; records of format "
            f"'{task.format}' have {', '.join((*texts, *images))}.",
            ("templates", place),
          )
        if field in images and segment != f"{{{field}}}":
          raise FieldError(
            f"the template '{template}' has the image {{{field}}} in a text: put {BREAK} between "
            "them.",
            ("templates", place),
          )
