import io

import numpy as np
from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError
from tests.data.raw.ingest_test import BLUE, RED, png
from tests.refusals import refused


def test_load_image_scales_crops_and_puts_on_white(tmp_path):
  wide = Image.new("RGB", (24, 8), RED)
  wide.paste(BLUE, (8, 0, 16, 8))
  wide.save(tmp_path / "wide.png")
  assert (reader.load_image(tmp_path / "wide.png", 8) == np.array(BLUE, np.uint8)[None, None]).all()
  (tmp_path / "clear.png").write_bytes(png((0, 0, 0, 0), mode="RGBA"))
  assert (reader.load_image(tmp_path / "clear.png", 4) == 255).all()
  (tmp_path / "gray.png").write_bytes(png(7, mode="L"))
  assert (reader.load_image(tmp_path / "gray.png", 4) == 7).all()


def test_the_content_decides_the_format_and_not_the_suffix(tmp_path):
  (tmp_path / "a.jpg").write_bytes(png(RED))
  assert (reader.load_image(tmp_path / "a.jpg", 4) == np.array(RED)).all()
  (tmp_path / "b.jpg").write_bytes(b"no image")
  with refused(UserError, "b.jpg", "another format"):
    reader.load_image(tmp_path / "b.jpg", 4)


def test_load_with_size_returns_the_size_of_the_upright_image():
  buffer, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = 6  # Orientation 6: readers must rotate the image by 90 degrees.
  Image.new("RGB", (30, 20)).save(buffer, "jpeg", exif=exif)
  pixels, size = reader.load_with_size(buffer.getvalue(), 8)
  assert (pixels.shape, size) == ((8, 8, 3), (20, 30))


def test_load_images_keeps_the_order(tmp_path):
  for i in range(9):
    (tmp_path / f"{i}.png").write_bytes(png((i, 0, 0)))
  images = reader.load_images([tmp_path / f"{i}.png" for i in range(9)], 4, num_threads=3)
  assert images[:, 0, 0, 0].tolist() == list(range(9))
  assert reader.load_images([], 4, 3).shape == (0, 4, 4, 3)
