"""Decodes images that clients send. Checks their sizes before decoding, and never fetches URLs.

Decoders can take long for images of strangers, and a thread that decodes cannot be stopped. So this
module is also a program, which `web.decoders` starts, and kills when a request is over.
"""

# H height, W width.

import base64
import io
import json
import os
import re
import select
import signal
import sys
import threading

import numpy as np
from PIL import Image, ImageOps

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.raw.image_parts import ImageFile
from cm3leon_jax.serving.errors import ApiError, refusal

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
Box = tuple[int, int, int, int]


def from_data_url(url: str, param: str) -> bytes:
  """Returns the bytes of an image in a data: URL. Raises ApiError for any other URL."""
  match = _DATA_URL.match(url)
  if match is None:
    raise refusal(
      f"{param} must be data:image/png;base64,... with the bytes of an image: the server fetches "
      "nothing.",
      param,
    )
  try:
    return base64.b64decode(url[match.end() :], validate=True)
  except ValueError as error:
    raise refusal(f"{param} is not valid base64.", param) from error


def _check_pixels(data: bytes, most_pixels: int, param: str) -> None:
  """Reads the header of an image. Raises ApiError for other data or for too many pixels."""
  try:
    with Image.open(ImageFile(data, param), formats=reader.FORMATS) as opened:
      width, height = opened.size
  except UserError as error:
    raise refusal(str(error), param) from error
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


def decode(
  image: bytes, mask: bytes | None = None, *, resolution: int, most_pixels: int, param: str
) -> tuple[np.ndarray, Box | None]:
  """Decodes the centered square of an image, [resolution, resolution, 3] uint8, and its mask.

  Raises:
    ApiError: a file is not an image, has too many pixels or parts, or is damaged, or see
      `box_of_mask`.
  """
  _check_pixels(image, most_pixels, param)
  try:
    pixels, size = reader.load_with_size(image, resolution)
  except UserError as error:
    raise refusal(
      f"{param} is damaged; it must be a PNG, JPEG, WebP, GIF or AVIF file.", param
    ) from error
  return pixels, None if mask is None else box_of_mask(mask, size, resolution, most_pixels)


def box_of_mask(mask: bytes, size: tuple[int, int], resolution: int, most_pixels: int) -> Box:
  """Returns the box around the fully transparent pixels of a mask.

  The mask is first cropped and scaled like its image.

    a mask of 4 x 4 pixels, transparent at rows 2 and 3 of column 0, resolution 8: (0, 4, 2, 8)

  Args:
    mask: PNG file with an alpha channel.
    size: (width, height) of the upright image.

  Raises:
    ApiError: the mask is not a PNG file, has another size or no alpha channel, or no fully
      transparent pixel.
  """
  _check_pixels(mask, most_pixels, "mask")
  width, height = size
  try:
    with Image.open(ImageFile(mask, "mask"), formats=("PNG",)) as opened:
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


def main() -> None:
  """Decodes the images that stdin has, one after the other, until stdin is closed.

  A request is a line of JSON, with the sizes of the files and the other arguments of `decode`, and
  then the files. An answer is a line with the box, and the pixels, or only a line with an ApiError.
  """
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The server decides when this process ends.
  closed = select.poll()
  closed.register(sys.stdin, 0)  # Reports only that the server has closed the pipe, or has ended.
  threading.Thread(target=lambda: (closed.poll(), os._exit(0)), daemon=True).start()
  while line := sys.stdin.buffer.readline():
    request = json.loads(line)
    files = [sys.stdin.buffer.read(size) for size in request.pop("sizes")]
    try:
      pixels, box = decode(*files, **request)
      answer, content = {"box": box}, pixels.tobytes()
    except ApiError as error:
      answer, content = vars(error), b""
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()
