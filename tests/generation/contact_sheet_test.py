import numpy as np
from PIL import Image

from cm3leon_jax.generation import writer


def test_contact_sheet_places_images(tmp_path):
  colors = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
  rows = [[np.full((64, 64, 3), c, np.uint8) for c in row] for row in colors]
  writer.save_png(
    tmp_path / "new" / "sheet.png", writer.contact_sheet(rows, ["a", "b"], ["one", "two"])
  )
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]
  sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
  size, step = 128, 128 + writer.GAP
  for i, row in enumerate(colors):
    for j, color in enumerate(row):
      y, x = writer.LABEL_HEIGHT + i * step, writer.LABEL_WIDTH + j * step
      assert (sheet[y : y + size, x : x + size] == color).all()


def test_contact_sheet_holds_texts_beside_images():
  image = np.full((64, 64, 3), 255, np.uint8)
  sheet = np.asarray(writer.contact_sheet([[image, "a red apple"], ["alone"]], ["", ""]))
  step, left = 128 + writer.GAP, writer.LABEL_WIDTH
  cells = [sheet[writer.GAP + i * step :, left + j * step :] for i in range(2) for j in range(2)]
  assert [bool((cell[:128, :128] < 128).any()) for cell in cells] == [False, True, True, False]
  size = (left + 2 * step, writer.GAP + step)
  assert writer.contact_sheet([["only", "texts"]], [""]).size == size


def test_a_long_text_ends_in_an_ellipsis():
  lines = writer.wrapped("word " * 100, 150, 42).split("\n")
  assert len(lines) == 3
  assert lines[-1].endswith("…")
  assert writer.wrapped("two words", 150, 42) == "two words"
