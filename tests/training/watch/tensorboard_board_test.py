import io

import numpy as np
from PIL import Image

from cm3leon_jax.training.watch.tensorboard_board import TensorBoard
from tests.training import events


def test_scalars_have_their_groups_and_the_rest_stays_out(tmp_path):
  board = TensorBoard(tmp_path, 1)
  board.scalars(1, {"loss": 2.5, "weight": 8.0, "time": 1e9, "step_seconds": 1.0})
  board.scalars(1, {"heldout_image_loss": 1.5})
  board.close()
  assert events.read(tmp_path) == {"train/loss": {1: [2.5]}, "heldout/image_loss": {1: [1.5]}}


def test_a_resumed_run_hides_what_the_killed_one_wrote_beyond_its_checkpoint(tmp_path):
  board = TensorBoard(tmp_path, 1)
  for step in range(1, 6):
    board.scalars(step, {"loss": float(step)})
  board.close()
  board = TensorBoard(tmp_path, 4)
  for step in range(4, 8):
    board.scalars(step, {"loss": 10.0 * step})
  board.close()
  # The restart in the same second wrote a second file.
  assert len(list(tmp_path.iterdir())) == 2
  assert events.read(tmp_path)["train/loss"] == {
    1: [1],
    2: [2],
    3: [3],
    4: [40],
    5: [50],
    6: [60],
    7: [70],
  }


def test_a_grid_of_samples_is_what_it_was(tmp_path):
  sheet = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  board = TensorBoard(tmp_path, 1)
  board.samples(7, Image.fromarray(sheet))
  board.close()
  (image,) = events.read(tmp_path)["samples"][7]
  np.testing.assert_array_equal(
    np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), sheet
  )
