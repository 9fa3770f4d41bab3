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
import warnings

import numpy as np
from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.raw.image_parts import ImageFile
from cm3leon_jax.errors import UserError
from cm3leon_jax.serving.errors import ApiError, refusal

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


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
      f"{param} cannot be read; it must be a PNG, JPEG, WebP, GIF, AVIF, BMP or TIFF file.", param
    ) from error
  if width * height > most_pixels:
    raise ApiError(
      413,
      f"{param} has {width * height:,} pixels ({width} x {height}); at most {most_pixels:,} are "
      "allowed.",
      param,
      "image_too_large",
    )


def decode(image: bytes, resolution: int, most_pixels: int, param: str) -> np.ndarray:
  """Decodes the centered square of an image, [resolution, resolution, 3] uint8.

  Raises:
    ApiError: a file is not an image, has too many pixels or parts, or is damaged.
  """
  _check_pixels(image, most_pixels, param)
  try:
    return reader.load_image(image, resolution)
  except UserError as error:
    raise refusal(
      f"{param} is damaged; it must be a PNG, JPEG, WebP, GIF, AVIF, BMP or TIFF file.", param
    ) from error


def png(image: np.ndarray) -> str:
  """Encodes [H, W, 3] uint8 as the base64 text of a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
  """Decodes the images that stdin has, one after the other, until stdin is closed.

  A request is a line of JSON, with the size of the file and the other arguments of `decode`, and
  then the file. An answer is an empty object and the pixels, or only an ApiError.
  """
  # Decoders' warnings and messages may be far longer than the file. Only errors are printed.
  warnings.simplefilter("ignore")
  sys.stderr = io.TextIOWrapper(io.FileIO(os.dup(2), "w"), write_through=True)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The server decides when this process ends.
  closed = select.poll()
  closed.register(sys.stdin, 0)  # Reports only that the server has closed the pipe, or has ended.
  threading.Thread(target=lambda: (closed.poll(), os._exit(0)), daemon=True).start()
  while line := sys.stdin.buffer.readline():
    request = json.loads(line)
    image = sys.stdin.buffer.read(request.pop("size"))
    answer: dict = {}
    try:
      content = decode(image, **request).tobytes()
    except ApiError as error:
      answer, content = vars(error), b""
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()
