"""Lists the formats of `cm3leon export`, and writes exports.

A format is a module of this package. Its function `write(folder, run) -> numbers` writes the
weights last, so that an unfinished export has no weights. `write` of this module calls it after it
has written the files that all formats share, and then writes the digests of all files.
`run.source.format_of` recognizes each format but hf by its files.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import os
from typing import TYPE_CHECKING

from etils import epath

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.json_files import plain, write_json
from cm3leon_jax.run.source import ABOUT, DIGESTS

if TYPE_CHECKING:
  from cm3leon_jax.config.settings import Settings
  from cm3leon_jax.run.run import Run
  from cm3leon_jax.weights.stored import StoredParams

# Maps the name of a format to the module of this package that writes it.
FORMATS = {
  "hf": "huggingface",
  "orbax": "orbax_checkpoint",
  "stablehlo": "stablehlo",
  "peft": "peft_adapter",
}
QUANTIZED = ("hf", "stablehlo")  # Formats with int8 weights.
COMPUTING = ("stablehlo",)  # Formats whose programs compute in the dtype of the weights.
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Choice:
  """Options that a user chooses for an export.

  Attributes:
    format: a key of `FORMATS`.
    dtype: dtype of the weights, one of `DTYPES`.
    quantize: "int8", or "" for no quantization.
    average: whether to write the moving average of the parameters. None: yes if the run has one.
  """

  format: str = "hf"
  dtype: str = "float32"
  quantize: str = ""
  average: bool | None = None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained run and the options of its export.

  `params` reads parameters from disk only when they are needed.
  """

  trained: Run
  params: StoredParams
  choice: Choice

  @property
  def settings(self) -> Settings:
    """Settings of the run."""
    return self.trained.settings

  @property
  def about(self) -> dict:
    """Content of export.json."""
    about = {**dataclasses.asdict(self.choice), "average": self.params.averaged}
    return about | {"step": self.params.step, "settings": plain(dataclasses.asdict(self.settings))}

  @property
  def text_tokenizer(self) -> epath.Path:
    """Folder with the text tokenizer."""
    return self.trained.stages / "text_tokenizer"


def check(choice: Choice, settings: Settings) -> None:
  """Raises UserError if the format does not support the options. Call it before any write."""
  if choice.quantize and choice.format not in QUANTIZED:
    raise UserError(
      f"--quantize={choice.quantize} is given, but --format={choice.format} does not support it: "
      f"use --format={' or '.join(QUANTIZED)}, or omit --quantize."
    )
  if choice.format in COMPUTING and choice.dtype == "float16":
    raise UserError(
      f"--dtype is float16, but with --format={choice.format} the decoder would also compute in "
      "float16: choose float32 or bfloat16."
    )
  if choice.format == "hf":
    from cm3leon_jax.weights import layouts

    layouts.layout_of(settings.model).check(settings.model)


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes an export to an empty folder: its weights after other files, and then digests.json.

  Creates `folder` if it is absent. Returns numbers for a summary, such as "parameters" and "bytes".

  Raises:
    UserError: see `check`.
  """
  from cm3leon_jax.data.documents import training_data
  from cm3leon_jax.export import image_tokenizer
  from cm3leon_jax.run.source import folder_of
  from cm3leon_jax.weights import sealing

  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  learned = training_data.collect(run.trained.folder, folder_of)
  write_json(folder / training_data.FILE, learned)
  write_json(folder / ABOUT, run.about)
  numbers = {} if run.choice.format == "peft" else image_tokenizer.write(folder, run.trained)
  module = importlib.import_module(f"cm3leon_jax.export.{FORMATS[run.choice.format]}")
  numbers |= module.write(folder, run)
  digests = sealing.digests(folder)
  digests.pop("README.md", None)  # Users edit the card.
  write_json(folder / DIGESTS, digests)
  return numbers


def clear(folder: epath.PathLike) -> None:
  """Empties the folder of a stage, beginning with the weights of an earlier export."""
  from cm3leon_jax.weights import tensor_files

  folder = epath.Path(folder)
  if folder.exists():
    tensor_files.remove(folder)
    folder.rmtree()
  folder.mkdir(parents=True)


@contextlib.contextmanager
def replacing(folder: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary folder, which replaces `folder` when the `with` block ends.

  If the block fails, `folder` does not change. A killed process may leave FOLDER.partial or
  FOLDER.old. The next export removes FOLDER.partial and renames FOLDER.old to FOLDER.

  Raises:
    UserError: `folder` is in a GCS bucket, where folders cannot be renamed, or exists and is not an
      export.
  """
  if "://" in os.fspath(folder):
    raise UserError(
      f"--output is {folder}, in a GCS bucket: choose a local folder and copy it to the bucket, or "
      "omit --output to export to the workdir."
    )
  folder = absolute(folder)
  is_export = (folder / ABOUT).exists()
  if folder.exists() and not (is_export or (folder.is_dir() and not any(folder.iterdir()))):
    raise UserError(
      f"--output is {folder}, which exists, but `cm3leon export` did not write it: choose another "
      "folder."
    )
  partial, old = (folder.parent / f"{folder.name}.{suffix}" for suffix in ("partial", "old"))
  if old.exists() and not folder.exists():
    old.rename(folder)
  for path in (partial, old):
    if path.exists():
      path.rmtree()
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    partial.rmtree()
    raise
  if folder.exists():
    folder.rename(old)
  partial.rename(folder)
  if old.exists():
    old.rmtree()
