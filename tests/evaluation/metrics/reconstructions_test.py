import numpy as np
import pytest

from cm3leon_jax.evaluation.metrics.reconstructions import compare, lab

WHITE, RED, BROWN = (255, 255, 255), (220, 0, 30), (139, 69, 19)


def drawing(ink, paper=WHITE, place=8):
  image = np.full((48, 48, 3), paper, np.uint8)
  image[place : place + 8, 8:16] = ink
  return image


def test_the_psnr_is_that_of_the_worse_part():
  image = drawing(RED)
  made = image.copy()
  made[8:16, 8:16, 0] -= 51  # A fifth of 255 in one of three channels.
  assert compare(image, made)[0] == pytest.approx(10 * np.log10(75))
  photo = np.random.default_rng(0).integers(0, 200, (48, 48, 3), np.uint8)
  assert compare(photo, photo + 51)[0] == pytest.approx(10 * np.log10(25))
  assert 60 < compare(photo, photo)[0] < 100


@pytest.mark.parametrize("paper", [WHITE, (0, 50, 230)])
def test_another_color_of_the_drawing_or_of_its_paper_is_seen(paper):
  expected = np.linalg.norm(lab(np.array(BROWN)) - lab(np.array(RED)))
  assert compare(drawing(BROWN, paper), drawing(RED, paper))[1] == pytest.approx(expected, abs=0.1)
  assert compare(drawing(RED, paper), drawing(RED, (255, 250, 220)))[1] > 9
  lost = np.full((48, 48, 3), paper, np.uint8)
  assert compare(drawing(BROWN, paper), lost)[1] > 40
  assert compare(lost, lost)[1] == 0


def test_edges_and_noise_of_the_paper_are_no_color():
  """Antialiased edges and a moved drawing change the pixels, but not the color of the ink."""
  soft = drawing(RED)
  soft[7, 8:16] = soft[16, 8:16] = (238, 128, 143)
  noisy = np.clip(soft + np.random.default_rng(0).integers(-4, 5, soft.shape), 0, 255)
  assert compare(noisy.astype(np.uint8), drawing(RED, place=10))[1] < 2


@pytest.mark.parametrize(
  ("color", "expected"),
  [(WHITE, (100, 0, 0)), ((0, 0, 255), (32.3, 79.2, -107.9)), ((8, 8, 8), (2.2, 0, 0))],
)
def test_lab_of_literals(color, expected):
  assert lab(np.array(color)) == pytest.approx(np.array(expected), abs=0.06)
