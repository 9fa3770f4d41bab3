"""Defines a protocol: the data, the columns, the metrics, and published figures of other models.

A protocol is one document of a YAML file (docs/evaluation.md). A file may have several documents,
one for each data set. A column is one way to generate: the number of retrieved documents, the
sampling settings, and the number of samples per prompt.
"""

import dataclasses
import hashlib
import importlib.resources
import json
from typing import Annotated, Any, Literal

from etils import epath
from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT, build
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.data.published.files import SPLITS
from cm3leon_jax.data.sources import yaml_documents
from cm3leon_jax.errors import FieldError, UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.generation.tasks import MASK, slug

HELDOUT = "heldout"  # Data format of the held-out pairs of the run.
FIELDS = ("prompt", "caption", "history")  # Fields that a template may contain.
TASKS = {"image": "{prompt}", "text": MASK}  # Name -> default template.
# One round of a dialog, in the format that CM3Leon uses for questions (table 5).
ROUND = "Question: {} Answer: {}."


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class EvaluatedData:
  """Data on which a protocol evaluates."""

  format: str
  split: str = ""
  count: NonNegativeInt = 200  # 0 means all.

  def __post_init__(self) -> None:
    splits = {HELDOUT: ("",), **SPLITS}
    if self.format not in splits:
      raise ValueError(f"format is '{self.format}'; it must be one of {', '.join(splits)}.")
    if self.split not in splits[self.format]:
      should = f"one of {', '.join(splits[self.format])}" if self.format in SPLITS else "left out"
      raise ValueError(f"split is '{self.split}'; for '{self.format}', it must be {should}.")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Column:
  """One way to generate, which is one column of the result tables."""

  name: Annotated[str, Field(min_length=1)]
  retrieve: NonNegativeInt = 0
  samples: PositiveInt = 1
  length: NonNegativeInt = 0  # Tokens of a text; 0 means 64.
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Protocol:
  """Definition of an evaluation; docs/evaluation.md describes the fields."""

  title: str
  task: Literal["image", "text"]
  data: EvaluatedData
  columns: Annotated[tuple[Column, ...], Field(min_length=1)]
  metrics: Annotated[tuple[str, ...], Field(min_length=1)]
  """Names of metrics in `metrics.METRICS`."""
  name: str = ""
  template: str = ""
  """Text of the prompt. For a text, it has one `<mask>`, which the text replaces, and the image
  follows. "" means `{prompt}` for images and `<mask>` (a caption) for texts."""
  seed: NonNegativeInt = 0
  """Chooses the examples and the resamples of intervals; example i is sampled with seed + i."""
  extractor: Literal["", "clip", "inception_tf1", "inception_torch"] = ""
  """Network of the distances; "" if no metric needs it. Inception resizes images as torch-fidelity
  (`tf1`) or as pytorch-fid (`torch`) does, which gives different distances."""
  resolution: NonNegativeInt = 0
  """Side of the images in pixels, if published figures require it. 0 accepts any size."""
  published: tuple[dict[str, Any], ...] = ()

  def __post_init__(self) -> None:
    names = [column.name for column in self.columns]
    if len(set(names)) < len(names):
      raise ValueError(f"two columns have the same name among {', '.join(names)}: rename one.")
    if self.task == "text" and any(column.samples > 1 for column in self.columns):
      raise ValueError(
        "a column of task text has samples > 1, but only images are ranked: set samples to 1."
      )
    try:
      self.template.format(**dict.fromkeys(FIELDS, ""))
    except (KeyError, ValueError, IndexError) as error:
      raise ValueError(
        f"the template '{self.template}' is wrong ({error!r}); it may contain {', '.join(FIELDS)}."
      ) from error
    masks = (self.template or TASKS[self.task]).count(MASK)
    if masks != (self.task == "text"):
      should = f"one {MASK}" if self.task == "text" else f"no {MASK}"
      raise ValueError(f"the template '{self.template}' has {masks} {MASK}; it must have {should}.")

  def text_of(self, example: Example) -> str:
    """Returns the prompt text of an example."""
    history = " ".join(ROUND.format(*spoken) for spoken in example.history)
    fields = {"prompt": example.prompt or "", "caption": example.caption, "history": history}
    fields = {name: " ".join(text.replace(MASK, " ").split()) for name, text in fields.items()}
    return (self.template or TASKS[self.task]).format(**fields).strip()


def names() -> list[str]:
  """Returns the names of the protocol files in the package."""
  files = (path.name for path in importlib.resources.files(__package__).iterdir())
  return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load(name_or_path: str) -> dict[str, Protocol]:
  """Reads the protocols of a file, given by its name in the package or its path.

  If the file is in the package, NAME/PROTOCOL selects one protocol, e.g. `cm3leon_table2/vizwiz`.
  Returns the protocols by the name of the file and their own name.

  Raises:
    UserError: the protocol does not exist, or a field is wrong.
  """
  file, _, one = name_or_path.partition("/")
  path = epath.Path(name_or_path)
  if file in names():
    result = parse((importlib.resources.files(__package__) / f"{file}.yaml").read_text(), file)
    result = [protocol for protocol in result if one in ("", protocol.name)]
  else:
    is_file = name_or_path.endswith((".yaml", ".yml")) and path.exists() and not path.is_dir()
    result = parse(yaml_documents.read(path), name_or_path) if is_file else []
  if not result:
    raise UserError(
      f"--protocol is '{name_or_path}'; it must be an existing YAML file, or one of "
      f"{', '.join(names())}, whose protocols are FILE/NAME."
    )
  file_name = path.stem if path.suffix else file
  return {"/".join(filter(None, [file_name, protocol.name])): protocol for protocol in result}


def parse(text: str, where: str) -> list[Protocol]:
  """Parses the YAML text of a protocol file. Error messages call the file `where`."""
  try:
    result = [_built(values) for _, values in yaml_documents.parse(text, where)]
  except FieldError as error:  # The message begins with `config.FIELD` or `config`.
    sentence = str(error).removeprefix("config").removeprefix(".")
    raise UserError(f"{where}{'' if sentence[0] in ' :' else ': '}{sentence}") from error
  different = {protocol.name for protocol in result}
  if not result or (len(result) > 1 and (len(different) < len(result) or "" in different)):
    raise UserError(f"{where} must have a protocol, or several with different names.")
  return result


def _built(values: Any) -> Protocol:
  fields = dict(values) if isinstance(values, dict) else {}
  if "data" in fields:
    fields["data"] = build(EvaluatedData, fields["data"], "data")
  if isinstance(columns := fields.get("columns"), list):
    fields["columns"] = [build(Column, x, f"columns[{i}]") for i, x in enumerate(columns)]
  return build(Protocol, fields)


def sampling_of(column: Column, base: SamplingConfig) -> SamplingConfig:
  """Returns the sampling settings of a column: the settings of the run, overridden by the column.

  Raises:
    UserError: a field of the column is not in `config.sampling` or is out of range.
  """
  try:
    return build(SamplingConfig, {**dataclasses.asdict(base), **column.sampling}, "sampling")
  except UserError as error:
    sentence = str(error).removeprefix("config.")
    raise UserError(f"column '{column.name}' of the protocol: {sentence}") from error


def stem(column: str) -> str:
  """Returns a file name for a column. Different columns get different file names."""
  return f"{slug(column)}-{digest(column)[:6]}"


def digest(value: Any) -> str:
  """Returns the SHA-256 of JSON values. The order of fields does not matter."""
  return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()
