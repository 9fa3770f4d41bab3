import re

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.data.instructions import grounding
from cm3leon_jax.data.instructions.files import open_records
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.raw.reader import load_image
from tests.data.instruction_releases import CAPTIONS, INSTANCES, RELEASES, write


def read(root, instances=None, captions=None):
  release = RELEASES["coco_objects"]
  write(root, {INSTANCES: instances or release[INSTANCES]})
  write(root, {CAPTIONS: captions or release[CAPTIONS]})
  return list(open_records("coco_objects", root, "val2017"))


def test_one_record_a_caption_with_the_objects_of_its_image(tmp_path):
  bottle, by_bottle, car = read(tmp_path)  # Skips image 9, which has no object in its square.
  assert bottle == Record(
    key="8/0",
    group="8",
    texts={"caption": "A bottle.", "objects": "bottle at location (199, 130) -> (204, 150)"},
    images={"image": f"{tmp_path}/val2017/000000000008.jpg"},
  )
  # The larger object is first. The square contains 9.5 columns of the car.
  objects = "bottle at location (0, 64) -> (128, 96), car at location (244, 0) -> (256, 256)"
  assert by_bottle.texts == {"caption": "A car by a bottle.", "objects": objects}
  assert (by_bottle.key, car.key) == ("7/0", "7/1")
  assert car.texts == {"caption": "One car.", "objects": objects}


@pytest.mark.parametrize("size", [(400, 200), (200, 400), (301, 200), (64, 64)])
def test_a_location_is_where_the_object_is_in_the_image_that_is_read(tmp_path, size):
  """Given a white box on black, the location of the object is where the loaded image shows it."""
  width, height = size
  left, top = width // 2 - 20, height // 2 - 10
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[top : top + 15, left : left + 30] = 255
  Image.fromarray(pixels).save(tmp_path / "a.png")
  read_as = load_image(str(tmp_path / "a.png"), grounding.SIDE)[..., 0] > 127
  columns, rows = np.flatnonzero(read_as.any(0)), np.flatnonzero(read_as.any(1))
  shown = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
  box = grounding.square_box((left, top, 30, 15), width, height)
  np.testing.assert_allclose(shown, box, atol=1)


def test_boxes_are_clipped_and_those_outside_are_none():
  assert grounding.square_box((100, 50, 100, 25), 400, 200) == (0, 64, 128, 96)
  assert grounding.square_box((0, 0, 400, 200), 400, 200) == (0, 0, 256, 256)
  assert grounding.square_box((0, 0, 100, 200), 400, 200) is None
  assert grounding.square_box((0, 301, 200, 90), 200, 400) is None
  assert grounding.square_box((150, 50, 0.1, 25), 400, 200) is None  # Narrower than a pixel.


def test_the_largest_objects_come_first_and_the_others_are_left_out():
  objects = [(f"cup{i}", (0, 0, 10 + i, 10)) for i in range(grounding.MOST_OBJECTS + 3)]
  names = re.findall(r"cup\d+", grounding.describe_objects(objects))
  assert names == [f"cup{i}" for i in range(10, 2, -1)]
  assert grounding.describe_objects([("cup", (0, 0, 9, 9)), ("bottle", (199, 130, 204, 150))]) == (
    "bottle at location (199, 130) -> (204, 150), cup at location (0, 0) -> (9, 9)"
  )
  assert grounding.describe_objects([]) == ""
