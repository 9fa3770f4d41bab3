"""Defines a protocol: the data, the columns, the metrics, and the figures that others published.

A protocol is a document of a YAML file; a file may have several, one for each set of data
(docs/evaluation.md). A column is one way to generate: retrieval, sampler, number of samples.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import importlib.resources
import json
import string
from typing import Annotated, Any, Literal

from etils import epath
from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT, UserError, build
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.files import SPLITS
from cm3leon_jax.data.sources import yaml_documents
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.generation.tasks import MASK, slug

HELDOUT = "heldout"  # Format of the data: the held-out pairs of the run.
FIELDS = ("prompt", "caption", "history")  # Of templates.
TASKS = {"image": "{prompt}", "text": MASK}  # Name -> default of the template.
# Rounds of a dialog, in the form that the paper gives questions (CM3Leon, table 5).
ROUND = "Question: {} Answer: {}."


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class EvaluatedData:
  """What is evaluated."""

  format: str
  """`heldout`, the held-out pairs of the run, or a format of `data/published/files.py`."""
  split: str = ""
  """Split of the files, e.g. `val`; held-out pairs have none."""
  count: NonNegativeInt = 200
  """Number of examples, chosen by the seed; 0: all."""

  def __post_init__(self) -> None:
    formats = (HELDOUT, *SPLITS)
    if self.format not in formats:
      raise ValueError(f"format is '{self.format}'; it must be one of {', '.join(formats)}.")
    splits = SPLITS.get(self.format, ("",))
    if self.split not in splits:
      should = f"one of {', '.join(splits)}" if self.format != HELDOUT else "left out"
      raise ValueError(f"split of '{self.format}' is '{self.split}'; it must be {should}.")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Column:
  """One way to generate; a column of the tables of results."""

  name: Annotated[str, Field(min_length=1)]
  """Title."""
  retrieve: NonNegativeInt = 0
  """Number of retrieved documents before a prompt."""
  samples: PositiveInt = 1
  """Samples of each prompt; of several, the one with the best CLIP score counts."""
  length: NonNegativeInt = 0
  """Largest number of tokens of a text; 0: 64."""
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of `config.sampling` that differ from those of the run."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Protocol:
  """What is measured, and how."""

  title: str
  """One line for tables and pages."""
  task: Literal["image", "text"]
  """`image`: an image for each prompt; `text`: what the mask in the template stands for."""
  data: EvaluatedData
  """What is evaluated."""
  columns: Annotated[tuple[Column, ...], Field(min_length=1)]
  """Ways to generate, each of which is measured."""
  metrics: Annotated[tuple[str, ...], Field(min_length=1)]
  """Names of `metrics.METRICS`."""
  name: str = ""
  """Short name, for files with several protocols."""
  template: str = ""
  """Text of the prompt, with `{prompt}` (the question, or the caption to draw), `{caption}` and
  `{history}` (of a dialog). One for task `text` has one `<mask>`, the text to write, and the image
  follows. "" is `{prompt}` for images and `<mask>`, a caption, for texts."""
  seed: NonNegativeInt = 0
  """Of the choice of examples, of the first prompt (each next one adds 1), and of intervals."""
  extractor: Literal["", "clip", "inception_tf1", "inception_torch", "dinov2"] = ""
  """Network whose features the distances compare; "": none is needed. Inception resizes images as
  torch-fidelity (`tf1`) or as pytorch-fid (`torch`), which give different distances."""
  extractor_tensors: str = ""
  """SHA-256 of the extractor's weights, `extractor.tensors` in a results.json: others are refused.
  "": any."""
  resolution: NonNegativeInt = 0
  """Side in pixels that images must have to compare with published figures; 0: any."""
  published: tuple[dict[str, Any], ...] = ()
  """Figures of others: `model`, `source`, `column` if it belongs to one, and values by the names of
  metrics."""

  def __post_init__(self) -> None:
    names = [column.name for column in self.columns]
    if len(set(names)) < len(names):
      raise ValueError(f"two columns have one name among {', '.join(names)}: rename one.")
    if self.task == "text" and any(column.samples > 1 for column in self.columns):
      raise ValueError("a column of task text has several samples, but CLIP ranks images: set 1.")
    try:
      parts = [part for part in string.Formatter().parse(self.template) if part[1] is not None]
    except ValueError as error:
      raise ValueError(f"the template '{self.template}' is wrong ({error}).") from error
    fields = {f"{name}{':' * bool(spec)}{spec}" for _, name, spec, _ in parts}
    if unknown := fields - set(FIELDS):
      raise ValueError(f"the template has {{{min(unknown)}}}; its fields are {', '.join(FIELDS)}.")
    masks = (self.template or TASKS[self.task]).count(MASK)
    if masks != (self.task == "text"):
      should = f"one {MASK}" if self.task == "text" else f"no {MASK}"
      raise ValueError(f"the template '{self.template}' has {masks} {MASK}; it must have {should}.")

  def text_of(self, example: Example) -> str:
    """Returns the text of an example's prompt."""
    history = " ".join(ROUND.format(*spoken) for spoken in example.history)
    fields = {"prompt": example.prompt or "", "caption": example.caption, "history": history}
    fields = {name: " ".join(text.replace(MASK, " ").split()) for name, text in fields.items()}
    return (self.template or TASKS[self.task]).format(**fields).strip()


def names() -> list[str]:
  """Returns the names of the files of protocols that come with the package."""
  folder = importlib.resources.files(__package__)
  return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if _is_yaml(path.name))


def load(name_or_path: str) -> tuple[Protocol, ...]:
  """Reads the protocols of a file, by its name or its path.

  Of a file that comes with the package, NAME/PROTOCOL is one protocol: `cm3leon_table2/vizwiz`.

  Raises:
    UserError: there is none, or a field is wrong.
  """
  file, _, one = name_or_path.partition("/")
  if file in names():
    found = parse((importlib.resources.files(__package__) / f"{file}.yaml").read_text(), file)
    chosen = [protocol for protocol in found if one in ("", protocol.name)]
    if not chosen:
      known = ", ".join(protocol.name for protocol in found if protocol.name)
      raise UserError(f"--protocol is '{name_or_path}'; {file} has {known or 'one, without name'}.")
    return tuple(chosen)
  path = epath.Path(name_or_path)
  if _is_yaml(name_or_path) and path.exists() and not path.is_dir():
    return parse(yaml_documents.read(path), name_or_path)
  raise UserError(
    f"--protocol is '{name_or_path}'; it must be a YAML file that exists, or one of "
    f"{', '.join(names())}."
  )


def parse(text: str, where: str) -> tuple[Protocol, ...]:
  """Makes the protocols of a file from its YAML; `where` names it in messages."""
  documents = [values for _, values in yaml_documents.parse(text, where)]
  if not documents:
    raise UserError(f"{where} is empty; it must have the fields of a protocol, one per line.")
  found = tuple(_parse_one(values, where) for values in documents)
  titles = [protocol.name for protocol in found]
  if len(found) > 1 and (len(set(titles)) < len(titles) or "" in titles):
    raise UserError(f"{where} has several protocols: give each a name of its own.")
  return found


def _parse_one(values: Any, where: str) -> Protocol:
  if not isinstance(values, Mapping):
    raise UserError(f"{where} must have the fields of a protocol, one per line.")
  values = dict(values)
  try:
    if isinstance(values.get("data"), Mapping):
      values["data"] = build(EvaluatedData, values["data"], "data")
    if isinstance(values.get("columns"), list):
      values["columns"] = tuple(
        build(Column, column, f"columns[{i}]") for i, column in enumerate(values["columns"])
      )
    return build(Protocol, values)
  except UserError as error:  # It begins with `config.FIELD`, or with `config` for the whole.
    sentence = str(error).removeprefix("config").removeprefix(".")
    joint = "" if sentence[0] in " :" else ": "
    raise UserError(f"{where}{joint}{sentence}") from error


def sampling_of(column: Column, base: SamplingConfig) -> SamplingConfig:
  """Returns the sampler of a column: that of the run with the fields of the column.

  Raises:
    UserError: a field of the column is none of `config.sampling`, or is out of range.
  """
  try:
    return build(SamplingConfig, {**dataclasses.asdict(base), **column.sampling}, "sampling")
  except UserError as error:
    sentence = str(error).removeprefix("config.")
    raise UserError(f"column '{column.name}' of the protocol: {sentence}") from error


def stem(column: str) -> str:
  """Returns the name of the files of a column: of different columns they differ."""
  return f"{slug(column)}-{digest(column)[:6]}"


def digest(value: Any) -> str:
  """Returns the SHA-256 of plain values, whatever the order of their fields."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def _is_yaml(name: str) -> bool:
  return name.endswith((".yaml", ".yml"))
