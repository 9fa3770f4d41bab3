"""Reads the input images of tasks."""

# H height, W width.

import io

import numpy as np
from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.images import upright_rgb
from cm3leon_jax.generation.tasks import GivenImage, Task


def load_image(image: GivenImage, resolution: int | None, crop: str = "center") -> np.ndarray:
  """Applies `reader.load_image` to a path, a PIL image, or an array, uint8 [H, W, 3]."""
  if isinstance(image, str):
    return reader.load_image(image, resolution, crop)
  if not isinstance(image, Image.Image):
    if (array := np.asarray(image)).dtype != np.uint8:
      result = f"an array of {array.dtype}" if isinstance(image, np.ndarray) else short(image)
      raise UserError(
        f"image is {result}; it must be a path, a PIL image or an array, uint8 [H, W, 3]."
      )
    image = Image.fromarray(array)
  buffer = io.BytesIO()
  upright_rgb(image).save(buffer, "PNG")
  return reader.load_image(buffer.getvalue(), resolution, crop)


def image_key(image: GivenImage) -> str | int:
  """Returns a key that is equal for tasks with the same image."""
  return image if isinstance(image, str) else id(image)


def given_key(task: Task) -> tuple:
  """Returns a key that is equal for tasks with the same image and the same `crop`."""
  return image_key(task.image), task.crop
