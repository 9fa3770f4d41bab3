"""Defines the choices of a user for an export, and the run to export."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from etils import epath

if TYPE_CHECKING:
  from cm3leon_jax.settings import Settings
  from cm3leon_jax.trained.run import Run
  from cm3leon_jax.weights.stored import StoredParams

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Choice:
  """A user's choices for an export.

  Attributes:
    format: a key of `FORMATS`.
    dtype: dtype of the weights, one of `DTYPES`.
    quantize: "int8", or "" for no quantization.
    average: whether to write the moving average of the parameters; None: if the run keeps one.
  """

  format: str = "hf"
  dtype: str = "float32"
  quantize: str = ""
  average: bool | None = None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained run and the user's choices, as the formats read them.

  `params` are read from disk when they are needed.
  """

  trained: Run
  params: StoredParams
  choice: Choice

  @property
  def settings(self) -> Settings:
    """Settings of the run."""
    return self.trained.settings

  @property
  def text_tokenizer(self) -> epath.Path:
    """Folder of the text tokenizer."""
    return self.trained.stages / "text_tokenizer"
