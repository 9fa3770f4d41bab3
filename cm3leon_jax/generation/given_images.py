"""Reads the input images of tasks and makes them square."""

# H height, W width.

import io

import numpy as np
from PIL import Image

from cm3leon_jax.config import printable
from cm3leon_jax.data.raw import reader
from cm3leon_jax.files.images import upright_rgb
from cm3leon_jax.generation.tasks import GivenImage, Task, image_name


def load_image(image: GivenImage, resolution: int | None, crop: str = "center") -> np.ndarray:
  """Applies `reader.load_image` to a path, a PIL image, or an array, uint8 [H, W, 3]."""
  if isinstance(image, str):
    return reader.load_image(image, resolution, crop)
  buffer = io.BytesIO()
  image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
  upright_rgb(image).save(buffer, "PNG")
  return reader.load_image(buffer.getvalue(), resolution, crop)


def square_image(task: Task, resolution: int) -> np.ndarray:
  """Crops or scales the image of a task to the `resolution` of the model. Prints any change."""
  image = task.image
  pixels = load_image(image, None)
  height, width = pixels.shape[:2]
  if (height, width) == (resolution, resolution):
    return pixels
  name = printable(image) if isinstance(image, str) else image_name(image)
  cut = f"the centered square of {min(height, width)} of "
  print(
    f"generate: {cut if height != width and task.crop == 'center' else ''}{name}, {width} x "
    f"{height} pixels, is scaled to {resolution} x {resolution}.",
    flush=True,
  )
  return load_image(image, resolution, task.crop)


def image_key(image: GivenImage) -> str | int:
  """Returns a key that is equal for tasks with the same image."""
  return image if isinstance(image, str) else id(image)


def given_key(task: Task) -> tuple:
  """Returns a key that is equal for tasks with the same image and the same `crop`."""
  return image_key(task.image), task.crop
