"""Defines the config section of raw data: source, checks, and size and format of images."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Format = Literal["auto", "folder", "sidecars", "webdataset", "parquet", "text"]
Crop = Literal["center", "pad"]


def _plain(options: Any) -> Any:
  """Converts a ConfigDict to the values that JSON has, as stored settings contain them."""
  try:
    return json.loads(json.dumps(options.to_dict() if hasattr(options, "to_dict") else options))
  except TypeError as error:
    raise ValueError(f"its values must be plain: {error}") from error


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RawConfig:
  """Settings of `cm3leon prepare_data`."""

  source: str = ""
  """Source of the records: a folder, a file or a glob pattern, local or in a GCS bucket; or
  `FILE.py:FUNCTION`, a function of yours that yields records, in a file relative to the config
  (docs/data_formats.md). Only `cm3leon prepare_data` needs it."""
  options: Annotated[dict[str, Any], BeforeValidator(_plain)] = dataclasses.field(
    default_factory=dict,
    hash=False,  # A section is hashed as a static argument.
  )
  """Keyword arguments of the function that `source` names."""
  format: Format = "auto"
  """Format of the files. `auto` detects it from the file names."""
  licenses: tuple[str, ...] = ()
  """Keeps only records with one of these licenses. () keeps all records."""
  default_license: str = ""
  """License of records without a license field."""
  default_attribution: str = ""
  """Attribution of records without an attribution field."""
  allow_outside: bool = False
  """Whether records may name images outside the folder of their file. Use it only for records that
  you trust, because such records can name any file on the machine."""
  max_caption_characters: PositiveInt = 2_000
  """Maximum length of a caption in characters. Longer captions are rejected."""
  max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
  """Maximum share of rejected records. If more are rejected, the command stops. The share is
  checked at the end and, once 10,000 records have been read, after every shard."""
  resolution: Annotated[int, Field(ge=0, le=8192)] = 256
  """Side in pixels of the square to which all images are scaled. 0 means 48, or 24 if most images
  of the source are smaller."""
  crop: Crop = "center"
  """Treatment of images that are not square. `center` crops to a centered square, `pad` adds white
  borders."""
  crops: Annotated[int, Field(ge=-1, le=999)] = 0
  """Number of random crops per training image, for sources of a few hundred images. Each crop
  becomes an additional pair with the caption and concept of its image. -1 chooses a number that
  yields about 3,200 pairs."""
  jpeg_quality: Annotated[int, Field(ge=0, le=95)] = 0
  """JPEG quality of the stored images. At 95, photographs take a quarter of the bytes of PNG. 0
  means lossless PNG."""
  heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
  """Share of concepts that are held out. The same share applies to texts and to interleaved
  documents. Records that have a field `split` are not counted."""
  num_threads: PositiveInt = 8
  """Number of images that are read, scaled and written in parallel."""
