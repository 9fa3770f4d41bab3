"""What a user asks of an export, the run that it is made of, and what a written export is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from etils import epath

from cm3leon_jax.files.json_files import read_foreign_json

if TYPE_CHECKING:
  from cm3leon_jax.settings import Settings
  from cm3leon_jax.weights.stored import StoredParams

DTYPES = ("float32", "bfloat16", "float16")
ABOUT = "export.json"  # Marks a folder as an export, and says of what.

# What `kind_of` returns -> what an export is.
KINDS = {
  "stablehlo": "in the format stablehlo",
  "orbax": "in the format orbax",
  "gpt2": "in the format gpt2",
  "int8": "with int8 weights",
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a user asks for.

  Attributes:
    format: a key of `FORMATS`.
    dtype: of the weights, of `DTYPES`.
    quantize: "int8" or "".
    average: whether to write the moving average; None: if the run keeps one.
  """

  format: str = "hf"
  dtype: str = "float32"
  quantize: str = ""
  average: bool | None = None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained run, as formats read it.

  Attributes:
    settings: of the run.
    workdir: of the run; its tokenizers are read.
    params: of the decoder, read from disk when they are needed.
    choice: what the user asks for.
    learned: folder that knows the data of the training; None: `workdir`.
  """

  settings: Settings
  workdir: epath.Path
  params: StoredParams
  choice: Choice
  learned: epath.Path | None = None


def kind_of(folder: epath.PathLike) -> str:
  """Returns the key of `KINDS` of an export, by its files; "": one of `hf`, or another folder."""
  folder = epath.Path(folder)
  for kind, name in (("stablehlo", "manifest.json"), ("orbax", "digests.json")):
    if (folder / name).exists():
      return kind
  path = folder / "config.json"
  described = read_foreign_json(path, {}) if path.exists() else {}
  if described.get("model_type") == "gpt2":
    return "gpt2"
  return "int8" if described.get("quantization_config") else ""
