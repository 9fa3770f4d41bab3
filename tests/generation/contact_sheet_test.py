import types

import numpy as np
from PIL import Image

from cm3leon_jax.generation import sample, writer


def test_contact_sheet_places_images(tmp_path):
  colors = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
  rows = [[np.full((64, 64, 3), c, np.uint8) for c in row] for row in colors]
  writer.save_png(
    tmp_path / "new" / "sheet.png", writer.contact_sheet(rows, ["a", "b"], ["one", "two"])
  )
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]
  sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
  size, step = 128, 128 + sample.GAP
  for i, row in enumerate(colors):
    for j, color in enumerate(row):
      y, x = writer.LABEL_HEIGHT + i * step, writer.LABEL_WIDTH + j * step
      assert (sheet[y : y + size, x : x + size] == color).all()


def test_the_true_image_of_a_heldout_caption_is_called_a_reconstruction(monkeypatch):
  """It is decoded from codes, so it differs from the image file."""
  monkeypatch.setattr(writer, "contact_sheet", lambda rows, labels, columns: columns)
  image = np.zeros((8, 8, 3), np.uint8)
  for key, title in (("a", "reconstruction"), ("", "given")):
    task = types.SimpleNamespace(row=0, key=key, label="a", settings_label="g", retrieve=2)
    made = types.SimpleNamespace(task=task, given=image, segments=(image,), neighbors=((),))
    assert writer.sample_sheet([[made]]) == [title, "1 of 2 retrieved, g"]
