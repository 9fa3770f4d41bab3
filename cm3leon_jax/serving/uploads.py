"""Decodes images that clients send. Checks their sizes before decoding, and never fetches URLs."""

# H height, W width.

import base64
import io
import re

import numpy as np
from PIL import Image, ImageOps

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import reader
from cm3leon_jax.serving.errors import ApiError, refusal

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


def from_data_url(url: str, param: str) -> bytes:
  """Returns the bytes of an image in a data: URL. Raises ApiError for any other URL."""
  scheme = url.partition(":")[0][:12].lower()
  if scheme in ("http", "https", "file", "ftp"):
    raise refusal(
      f"{param} begins with {scheme}:, but the server fetches nothing: send the image itself as "
      "data:image/png;base64,...",
      param,
    )
  match = _DATA_URL.match(url)
  if match is None:
    raise refusal(f"{param} must be data:image/png;base64,... with the bytes of an image.", param)
  try:
    return base64.b64decode(url[match.end() :], validate=True)
  except ValueError as error:
    raise refusal(f"{param} is not valid base64.", param) from error


def _check_pixels(data: bytes, most_pixels: int, param: str) -> None:
  """Reads the header of an image. Raises ApiError for other data or for too many pixels."""
  try:
    with Image.open(io.BytesIO(data), formats=reader.FORMATS) as opened:
      width, height = opened.size
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    message = f"{param} has far too many pixels; at most {most_pixels:,} are allowed."
    raise ApiError(413, message, param, "image_too_large") from error
  except Exception as error:  # Decoders raise any kind of error for damaged files.
    raise refusal(
      f"{param} cannot be read; it must be a PNG, JPEG, WebP, GIF or AVIF file.", param
    ) from error
  if width * height > most_pixels:
    raise ApiError(
      413,
      f"{param} has {width * height:,} pixels ({width} x {height}); at most {most_pixels:,} are "
      "allowed.",
      param,
      "image_too_large",
    )


def decode(data: bytes, resolution: int, most_pixels: int, param: str = "image") -> np.ndarray:
  """Decodes the centered square of an image to [resolution, resolution, 3] uint8.

  Raises:
    ApiError: the file is not an image, has too many pixels, or is damaged.
  """
  _check_pixels(data, most_pixels, param)
  try:
    return reader.load_image(data, resolution)
  except UserError as error:
    raise refusal(
      f"{param} is damaged; it must be a PNG, JPEG, WebP, GIF or AVIF file.", param
    ) from error


def box_of_mask(
  mask: bytes, image: bytes, resolution: int, most_pixels: int
) -> tuple[int, int, int, int]:
  """Returns the box around the fully transparent pixels of a mask.

  The mask is first cropped and scaled like its image.

    a mask of 4 x 4 pixels, transparent at rows 2 and 3 of column 0, resolution 8: (0, 4, 2, 8)

  Args:
    mask: PNG file with an alpha channel. Its size is the image's size when both are upright.
    image: file of the image, which `decode` has accepted.

  Raises:
    ApiError: the mask is not a PNG file, has another size or no alpha channel, or no fully
      transparent pixel.
  """
  _check_pixels(mask, most_pixels, "mask")
  with Image.open(io.BytesIO(image), formats=reader.FORMATS) as opened:
    width, height = ImageOps.exif_transpose(opened).size
  try:
    with Image.open(io.BytesIO(mask), formats=("PNG",)) as opened:
      has_alpha = opened.has_transparency_data
      alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
  except Exception as error:
    raise refusal(
      "mask cannot be read; it must be a PNG file with transparency.", "mask"
    ) from error
  if alpha.size != (width, height):
    raise refusal(
      f"mask has {alpha.width} x {alpha.height} pixels; it must have {width} x {height} like the "
      "image.",
      "mask",
    )
  hole = alpha.point(lambda value: 255 if value == 0 else 0)
  # Crop the mask in the same way as `reader.load_image` crops its image. Pixels stay black or
  # white.
  hole = ImageOps.fit(hole, (resolution, resolution), Image.Resampling.NEAREST)
  if has_alpha and (found := hole.getbbox()) is not None:
    return found
  raise refusal(
    "mask has no fully transparent pixel: make the area to fill in transparent.", "mask"
  )


def png(image: np.ndarray) -> str:
  """Encodes [H, W, 3] uint8 as the base64 text of a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()
