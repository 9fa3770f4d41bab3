import numpy as np

from cm3leon_jax.evaluation import judged_sheet
from cm3leon_jax.evaluation.judged_sheet import SIDE, SheetImages


def image_of(color, side=48):
  return np.full((side, side, 3), color, np.uint8)


ORIGINAL, NEIGHBOR, SAMPLE = (10, 20, 30), (40, 50, 60), (70, 80, 90)


def shown(neighbors=1, right=(True, False), caption="a red bell"):
  samples = {f"guidance {i}": (image_of(SAMPLE, 8), value) for i, value in enumerate(right)}
  return SheetImages(caption, image_of(ORIGINAL), (image_of(NEIGHBOR),) * neighbors, samples)


def pixels_of(*captions):
  return np.asarray(judged_sheet.render(captions))


def count(sheet, color):
  return int((sheet == color).all(-1).sum())


def test_each_image_of_a_caption_is_on_the_sheet():
  sheet = pixels_of(shown(), shown(), shown())
  assert count(sheet, ORIGINAL) == 3 * SIDE**2
  assert count(sheet, NEIGHBOR) == 3 * SIDE**2
  assert 0.9 < count(sheet, SAMPLE) / (6 * SIDE**2) < 1  # The mark covers a corner of each sample.


def test_right_and_wrong_samples_differ_in_shape_and_not_only_in_color():
  right, wrong = (pixels_of(shown(right=(value,))) for value in (True, False))
  frame = 4 * judged_sheet.FRAME * (SIDE + judged_sheet.FRAME)
  assert count(right, judged_sheet.RIGHT) - count(wrong, judged_sheet.RIGHT) > 0.9 * frame
  assert count(wrong, judged_sheet.WRONG) - count(right, judged_sheet.WRONG) > 0.9 * frame
  # The white strokes of the check and of the cross, inside their discs.
  check, cross = (
    (np.asarray(judged_sheet._badge(value))[8:-8, 8:-8, :3] > 200).all(-1)
    for value in (True, False)
  )
  assert min(check.sum(), cross.sum()) > 0.1 * check.size
  assert (check != cross).sum() > 0.5 * (check | cross).sum()
