"""Types the keyword arguments of `CM3Leon`'s methods, so that type checkers find mistakes."""

from typing import Literal, TypedDict

from cm3leon_jax.decoding.config import Method, Schedule


class TextSampling(TypedDict, total=False):
  """Fields of `config.sampling` for texts."""

  text_temperature: float
  text_top_k: int
  text_top_p: float


class TopP(TypedDict, total=False):
  """Fields of `config.sampling` for top-p sampling of image codes."""

  temperature: float
  top_k: int
  top_p: float


class ImageCodes(TopP, total=False):
  """Fields of `config.sampling` for image codes, with any sampling method."""

  method: Method
  contrastive_k: int
  contrastive_alpha: float
  contrastive_temperature: float
  amateur_temperature: float
  guidance_schedule: Schedule


class ImageSampling(ImageCodes, total=False):
  """Fields of `config.sampling` that `generate` and `infill` use."""

  guidance: float


class EditSampling(ImageCodes, total=False):
  """Fields of `config.sampling` that `edit` uses."""

  image_guidance: float
  edit_guidance: float


class DocumentSampling(TopP, TextSampling, total=False):
  """Fields of `config.sampling` that `interleave` uses."""


class GenerateOptions(ImageSampling, total=False):
  """Keyword arguments of `CM3Leon.generate`."""

  num_samples: int
  retrieve: int | None
  seed: int
  rank: bool


class TextOptions(TextSampling, total=False):
  """Keyword arguments of `CM3Leon.caption` and `CM3Leon.answer`."""

  length: int
  retrieve: int
  seed: int


class LoadOptions(TypedDict, total=False):
  """Fields of `GeneratorConfig` that `CM3Leon.load` accepts."""

  batch_size: int
  weight_dtype: Literal["compute", "int8"]
  cache_dtype: Literal["compute", "int8"]
