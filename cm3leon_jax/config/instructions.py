"""Defines the config section of instruction tuning, and checks tasks and record formats."""

from collections.abc import Mapping, Sequence
import dataclasses
import posixpath
import re
from typing import Annotated, Any, Literal

from pydantic import (
  BeforeValidator,
  Field,
  NonNegativeFloat,
  NonNegativeInt,
  ValidationInfo,
  field_validator,
)
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT, build
from cm3leon_jax.errors import FieldError

BREAK = "<break>"  # Separates the segments of a template.
EDIT = "Edit first image following the instruction"  # First segment of an edit (CM3Leon, table 5).
FIELD = re.compile(r"\{(\w+)(\??)\}")  # A field of a template: name, "?" if optional.
LossOn = Literal["all", "target"]


@dataclasses.dataclass(frozen=True)
class Format:
  """A file format of instruction records.

  Attributes:
    splits: splits that can be read. () allows any split, which is then the name of a file.
    images: names of the images in a record. () means that each record in the file names its texts
      and images.
  """

  splits: tuple[str, ...]
  texts: tuple[str, ...]
  images: tuple[str, ...] = ("image",)


# Split of Localized Narratives -> prefix of file names, number of files, image path for an id.
NARRATIVES = {
  "open_images_train": ("open_images_train_v6", 10, "train/{}.jpg"),
  "open_images_validation": ("open_images_validation", 1, "validation/{}.jpg"),
  "open_images_test": ("open_images_test", 1, "test/{}.jpg"),
  "coco_train": ("coco_train", 4, "train2017/{:0>12}.jpg"),
  "coco_val": ("coco_val", 1, "val2017/{:0>12}.jpg"),
  "flickr30k_train": ("flickr30k_train", 1, "flickr30k-images/{}.jpg"),
  "flickr30k_val": ("flickr30k_val", 1, "flickr30k-images/{}.jpg"),
  "flickr30k_test": ("flickr30k_test", 1, "flickr30k-images/{}.jpg"),
  "ade20k_train": ("ade20k_train", 1, "ADEChallengeData2016/images/training/{}.jpg"),
  "ade20k_validation": ("ade20k_validation", 1, "ADEChallengeData2016/images/validation/{}.jpg"),
}
FORMATS = {
  "coco_2014": Format(("train", "val"), ("caption",)),
  "coco_2017": Format(("train", "val"), ("caption",)),
  "coco_karpathy": Format(("train", "restval", "val", "test"), ("caption",)),
  "vg_paragraphs": Format(("train", "val", "test"), ("caption",)),
  "vqa_v2": Format(("train", "val"), ("question", "answer")),
  "ok_vqa": Format(("train", "val"), ("question", "answer")),
  "vizwiz": Format(("train", "val"), ("question", "answer")),
  "flickr30k": Format(("train", "val", "test"), ("caption",)),
  "localized_narratives": Format(tuple(NARRATIVES), ("caption",)),
  "textvqa": Format(("train", "val"), ("question", "answer")),
  "scienceqa": Format(
    ("train", "val", "test"),
    ("question", "context", "options", "answer", "explanation", "reasoning"),
  ),
  "instruct_pix2pix": Format(
    ("train", "val", "test"),
    ("instruction", "input_caption", "output_caption"),
    ("before", "after"),
  ),
  "coco_objects": Format(("train2014", "val2014", "train2017", "val2017"), ("caption", "objects")),
  "llava": Format(
    (
      "llava_instruct_150k",
      "llava_instruct_80k",
      "conversation_58k",
      "detail_23k",
      "complex_reasoning_77k",
      "llava_v1_5_mix665k",
    ),
    ("instruction", "answer"),
  ),
  "jsonl": Format((), (), ()),
}


def fields_of(template: str) -> list[str]:
  """Returns the field names in a template or a part of a template."""
  return [name for name, _ in FIELD.findall(template)]


def is_edit(template: str) -> bool:
  """Returns whether a template is that of an edit: its first segment is `EDIT`."""
  return split_template(template)[0] == EDIT


def split_template(template: str) -> list[str]:
  """Splits a template into segments and strips white space around each segment."""
  return [segment.strip() for segment in template.split(BREAK)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionTask:
  """A task of instruction tuning. The key of a record selects its template."""

  name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
  """Unique name."""
  templates: Annotated[tuple[str, ...], Field(min_length=1)]
  """Texts and images in their order. `{field}` inserts a field of the record, `<break>` separates
  segments, and each image must be a separate segment. A line with `{field?}` is omitted if the
  field is empty in a record."""
  target: Annotated[str, Field(min_length=1)]
  """Field that the model predicts."""
  format: Annotated[str, Field(min_length=1)]
  """Format of the records, see docs/data_formats.md#instruction-files."""
  train: Annotated[str, Field(min_length=1)] = "train"
  """Split for training."""
  heldout: str = ""
  """Split for the held-out loss. An empty value means none."""
  root: str = ""
  """Folder of the files, relative to `config.instructions.root`."""
  images: str = ""
  """Folder of the images, relative to `config.instructions.root`. An empty value means the folder
  of the files."""
  maps: dict[str, str] = dataclasses.field(default_factory=dict)
  """Additional images of a record: field name -> `canny` or `scribble` (computed from the target),
  or a folder in `config.instructions.root` whose maps have the file names of the images."""
  records: NonNegativeInt = 0
  """Maximum number of training records; the first ones are used. 0 means all."""
  heldout_records: NonNegativeInt = 500
  """Maximum number of held-out records; the first ones are used. 0 means all."""
  weight: NonNegativeFloat = 1.0
  """Factor by which the task's share of the mixture is multiplied."""
  cap: NonNegativeInt = 0
  """Maximum number of records that counts toward the task's share. 0 means no maximum."""
  loss_weight: Annotated[float, Field(gt=0)] = 1.0
  """Weight of each target token in the loss. An answer has few tokens, an image has many."""
  drop_instruction: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples without the instruction, which is the last text segment before the target.
  These samples train the guidance stream that has only the input image. Requires an image as the
  target."""
  drop_all: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples in which `<mask:0>` replaces everything before the target. Requires an image
  as the target."""

  # These are field validators, because a model validator does not report which field is wrong.
  @field_validator("templates")
  @classmethod
  def _check_segments(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
      if set("{}") & set(FIELD.sub("", template)):
        raise ValueError(
          f"the template '{template}' has a brace outside of a field: write fields as {{name}}."
        )
      if not all(split_template(template)):
        raise ValueError(f"the template '{template}' has an empty segment next to a {BREAK}.")
      for line in template.replace(BREAK, "\n").split("\n"):
        if any(mark for _, mark in FIELD.findall(line)) and len(fields_of(line)) > 1:
          raise ValueError(
            f"the template '{template}' has an optional field on a line with other fields: put it "
            "on a separate line."
          )
    return templates

  @field_validator("target")
  @classmethod
  def _check_target(cls, target: str, info: ValidationInfo) -> str:
    for template in info.data.get("templates", ()):
      given = f"{{{target}}}" in template  # False for an optional field.
      count = fields_of(template).count(target) if given else 0
      if count != 1:
        raise ValueError(
          f"the template '{template}' must have the target {{{target}}} once; it occurs {count} "
          "times."
        )
    return target

  @field_validator("drop_all")
  @classmethod
  def _check_drops(cls, drop_all: float, info: ValidationInfo) -> float:
    if drop_all + info.data.get("drop_instruction", 0) > 1:
      raise ValueError("the sum of drop_instruction and drop_all must be at most 1.")
    return drop_all


def make_task(values: Any) -> InstructionTask:
  """Builds a task from a mapping of its fields. Raises FieldError if a field is invalid."""
  if not isinstance(values, InstructionTask):
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
      raise FieldError("a task must be a mapping of fields, the first of which is `name: ...`.")
    try:
      values = build(InstructionTask, values)
    except FieldError as error:
      sentence = str(error).removeprefix("config")
      sentence = sentence[1:] if sentence.startswith(".") else f"the task{sentence}"
      raise FieldError(sentence.replace("a valid tuple", "a list"), error.path) from error
  check_format(values)
  return values


def check_format(task: InstructionTask) -> None:
  """Checks that the splits of a task fit its format. `tasks.join_record` checks its templates.

  Raises:
    FieldError: the format or a split is unknown, or the training split is also the held-out split.
  """
  if task.format not in FORMATS:
    names = ", ".join(FORMATS)
    raise FieldError(f"format is '{task.format}'; it must be one of {names}.", ("format",))
  splits = FORMATS[task.format].splits
  for field in ("train", "heldout"):
    split = getattr(task, field)
    if splits and split not in splits and (split or field == "train"):
      raise FieldError(
        f"{field} is '{split}'; format '{task.format}' has the splits {', '.join(splits)}.",
        (field,),
      )
  if task.heldout == task.train:
    raise FieldError(
      f"heldout is '{task.heldout}', which is the training split: name another.", ("heldout",)
    )


def _own_tasks(values: Any) -> tuple[InstructionTask, ...]:
  if not isinstance(values, Sequence) or isinstance(values, str):
    raise ValueError(f"it is {values!r}; it must be a tuple of tasks, each a dict of fields.")
  found = []
  for number, value in enumerate(values, 1):
    try:
      found.append(make_task(value))
    except FieldError as error:
      raise ValueError(f"task {number}: {error}") from error
  return tuple(found)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionsConfig:
  """Tasks of instruction tuning and their mixture (CM3Leon, section 4; docs/tuning.md).

  Without tasks, a run trains only on its documents.
  """

  tasks: str = ""
  """YAML file of tasks, or a table of the package: `cm3leon` or `tutorial`."""
  own_tasks: Annotated[tuple[InstructionTask, ...], BeforeValidator(_own_tasks)] = ()
  """Additional tasks, each a dict with the fields of a YAML task (docs/tuning.md)."""
  only: tuple[str, ...] = ()
  """Names of the tasks to train. () means all."""
  root: str = ""
  """Folder of the files of all tasks. An empty value means the folder of the file `tasks`, or the
  current folder without such a file."""
  allow_outside: bool = False
  """Whether tasks may name folders outside `root`, and records images outside the image folder of
  their task. Use it only for tasks and records that you trust, because they can then name any file
  of the machine."""
  max_records: NonNegativeInt = 0
  """Maximum number of training records per task; the first ones are used. 0 means that only
  `records` of the task limits them."""
  redrawn: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of training records whose input images are first encoded and decoded by the image
  tokenizer, so that they look like generated images."""
  loss_on: LossOn = "all"
  """Tokens that count in the loss. `all`: every token, including the instruction, as in the paper.
  `target`: only the answer."""
  instruction_first: bool = False
  """Whether the instruction of an edit comes before the input image, not after it as in the paper.
  It decides the order in samples whose template begins with "Edit first image following the
  instruction", and in requests of the task `edit`. A small decoder then learns earlier which object
  is meant."""
  replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of positions for the run's documents, with rows as in pretraining. Reduces forgetting."""
  least_ratio: Annotated[float, Field(gt=0)] = 0.3
  """Lower bound of a task's size in the mixture, relative to the mean size (paper: 0.3)."""
  most_ratio: Annotated[float, Field(gt=0)] = 3.0
  """Upper bound of a task's size in the mixture, relative to the mean size (paper: 3)."""

  @property
  def folder(self) -> str:
    """Returns the folder of the files of all tasks."""
    return self.root or posixpath.dirname(self.tasks)

  @property
  def any(self) -> bool:
    """Returns whether the config has any task."""
    return bool(self.tasks or self.own_tasks)
