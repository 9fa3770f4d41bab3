import io

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import finetune
from cm3leon_jax.data.raw import reader
from cm3leon_jax.files.images import upright_rgb
from cm3leon_jax.generation import calls, given_images

RAMP = np.tile(np.arange(0, 65_536, 257, dtype=np.uint16), (3, 1))  # 0 to 255, times 257.
GRAY = RAMP // 257
# An image; the height, width and mean of what is read.
DOORS = {
  "gray": (Image.fromarray(RAMP), 3, 256, 127.5),
  "clear": (Image.new("RGBA", (6, 4), (0, 0, 0, 0)), 4, 6, 255),
  "turned": (Image.new("RGB", (6, 4), "red"), 6, 4, 85),
}


def test_gray_of_many_bits_is_scaled_and_not_clipped():
  kinds = [RAMP.astype(kind) for kind in ("u2", ">u2", "i4", "f4")]
  for gray in (*kinds, GRAY.astype("i4")):
    image = Image.fromarray(gray)
    assert image.mode[0] in "IF"
    np.testing.assert_array_equal(np.asarray(upright_rgb(image)), np.stack([GRAY] * 3, 2))


def test_other_modes_keep_their_colors_and_clear_pixels_become_white():
  palette = Image.new("P", (1, 1), 0)
  palette.info["transparency"] = 0
  clear = [palette, Image.new("LA", (1, 1), (0, 0)), Image.new("RGBA", (1, 1), (0, 0, 0, 0))]
  modes = ("1", "L", "P", "CMYK", "YCbCr", "RGBA")
  for image in (*clear, *(Image.new("RGB", (1, 1), "white").convert(mode) for mode in modes)):
    assert upright_rgb(image).getpixel((0, 0)) == (255, 255, 255), image.mode


@pytest.mark.parametrize("kind", DOORS)
def test_a_folder_a_pair_and_an_argument_of_the_api_are_read_alike(kind, tmp_path):
  """Regression: pairs and PIL images lay on their side, were put on black, or became white."""
  path, (image, *expected) = tmp_path / "image.png", DOORS[kind]
  exif = image.getexif()
  exif[0x0112] = 6 if kind == "turned" else 1
  image.save(path, exif=exif)
  of_folder = reader.load_image(path, None)
  assert [*of_folder.shape[:2], of_folder.mean()] == expected
  with Image.open(path) as opened:
    for given in (str(path), opened):
      stored = Image.open(io.BytesIO(finetune.as_png(given)))
      np.testing.assert_array_equal(np.asarray(stored), of_folder)
      of_api = given_images.load_image(calls.expanded(given), None)
      np.testing.assert_array_equal(of_api, of_folder)
