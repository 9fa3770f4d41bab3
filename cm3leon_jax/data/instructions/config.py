"""Config section of instruction tuning: its tasks, and what is known of their formats."""

from collections.abc import Mapping, Sequence
import dataclasses
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

from cm3leon_jax import worlds
from cm3leon_jax.config import STRICT, FieldError, build

BREAK = "<break>"  # Between the segments of a template.
FIELD = re.compile(r"\{(\w+)(\??)\}")  # Of a template: its name, and a mark if it is optional.
LossOn = Literal["all", "target"]


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    splits: that can be read; (): any, the name of a file.
    texts: names of the texts of its records.
    images: names of the images of its records; (): the file names texts and images.
  """

  splits: tuple[str, ...]
  texts: tuple[str, ...]
  images: tuple[str, ...] = ("image",)


FORMATS = {
  "coco_2014": Format(("train", "val"), ("caption",)),
  "coco_2017": Format(("train", "val"), ("caption",)),
  "coco_karpathy": Format(("train", "restval", "val", "test"), ("caption",)),
  "vg_paragraphs": Format(("train", "val", "test"), ("caption",)),
  "vqa_v2": Format(("train", "val"), ("question", "answer")),
  "ok_vqa": Format(("train", "val"), ("question", "answer")),
  "vizwiz": Format(("train", "val"), ("question", "answer")),
  "flickr30k": Format(("train", "val", "test"), ("caption",)),
  "localized_narratives": Format(
    (
      "open_images_train",
      "open_images_validation",
      "open_images_test",
      "coco_train",
      "coco_val",
      "flickr30k_train",
      "flickr30k_val",
      "flickr30k_test",
      "ade20k_train",
      "ade20k_validation",
    ),
    ("caption",),
  ),
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
  """Returns the names of the fields of a template, or of a part of it."""
  return [name for name, _ in FIELD.findall(template)]


def split_template(template: str) -> list[str]:
  """Returns the segments of a template, without the white space around them."""
  return [segment.strip() for segment in template.split(BREAK)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionTask:
  """One task; the templates of a record are chosen by its key, each as often."""

  name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
  """Unique name."""
  templates: Annotated[tuple[str, ...], Field(min_length=1)]
  """Texts and images in their order: `{field}` is a field of the records, `<break>` separates
  segments, and an image is a segment of its own. A line with `{field?}` is left out if this text
  is empty in a record."""
  target: Annotated[str, Field(min_length=1)]
  """Field that is to be predicted."""
  format: Annotated[str, Field(min_length=1)]
  """Format of the records: `scenes/TASK`, or one of docs/data_formats.md#instruction-files."""
  train: Annotated[str, Field(min_length=1)] = "train"
  """Split that is trained on."""
  heldout: str = ""
  """Split of the held-out loss; "": none."""
  root: str = ""
  """Folder of the files, in `config.instructions.root`."""
  images: str = ""
  """Folder of the images, in `config.instructions.root`; "": `root`."""
  maps: dict[str, str] = dataclasses.field(default_factory=dict)
  """More images of a record, by their fields: `canny` or `scribble`, which are computed, or a
  folder in `config.instructions.root` with a map under the file name of each image."""
  records: NonNegativeInt = 0
  """Most records that are trained on, the first ones; 0: all. `scenes` needs a number."""
  heldout_records: NonNegativeInt = 500
  """Most held-out records, the first ones; 0: all."""
  weight: NonNegativeFloat = 1.0
  """Factor of its share of the mixture."""
  cap: NonNegativeInt = 0
  """Largest number of records that counts for its share; 0: all."""
  loss_weight: Annotated[float, Field(gt=0)] = 1.0
  """Weight of each of its targets in the loss. An answer has few tokens, an image has many."""
  drop_instruction: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples without the segment before the target, a text, for guidance by the given
  image alone. Only samples that predict an image lack something."""
  drop_all: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples in which `<mask:0>` stands for all that is before the target."""

  # Validators of fields, not of the whole, so that an error has the field's place in a file.
  @field_validator("templates")
  @classmethod
  def _check_segments(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
      if set("{}") & set(FIELD.sub("", template)):
        raise ValueError(
          f"the template '{template}' has a brace that belongs to no field: write {{name}}."
        )
      if not all(split_template(template)):
        raise ValueError(f"the template '{template}' has an empty segment beside a {BREAK}.")
      for line in template.replace(BREAK, "\n").split("\n"):
        if any(mark for _, mark in FIELD.findall(line)) and len(fields_of(line)) > 1:
          raise ValueError(
            f"the template '{template}' has an optional field beside another one: give it a line "
            "of its own."
          )
    return templates

  @field_validator("target")
  @classmethod
  def _check_target(cls, target: str, info: ValidationInfo) -> str:
    for template in info.data.get("templates", ()):
      given = f"{{{target}}}" in template  # Not as an optional field.
      count = fields_of(template).count(target) if given else 0
      if count != 1:
        raise ValueError(
          f"the template '{template}' must have {{{target}}}, the target, once; it has it {count} "
          "times."
        )
    return target

  @field_validator("drop_all")
  @classmethod
  def _check_drops(cls, drop_all: float, info: ValidationInfo) -> float:
    if drop_all + info.data.get("drop_instruction", 0) > 1:
      raise ValueError("drop_instruction and drop_all together are more than 1.")
    return drop_all


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
  world = worlds.world_of_format(task.format)
  if not world and task.format not in FORMATS:
    names = ", ".join([*(f"{name}/TASK" for name in worlds.MODULES), *FORMATS])
    raise FieldError(f"format is '{task.format}'; it must be one of {names}.", ("format",))
  splits = ("train", "heldout") if world else FORMATS[task.format].splits
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
  if world:
    for field in ("records", "heldout_records"):
      if not getattr(task, field) and (task.heldout or field == "records"):
        raise FieldError(f"{field} is 0; {world} are drawn without end: set a number.", (field,))
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
