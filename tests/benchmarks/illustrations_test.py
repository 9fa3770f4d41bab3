"""Tests the judge of drawings by drawings of shapes, and the rows that need no model."""

import json

import numpy as np
from PIL import Image, ImageDraw
import pytest

from benchmarks.evidence import drawing_judge, illustrations
from cm3leon_jax.data.sources.splits import fraction
from cm3leon_jax.errors import UserError

SIDE = 32
STYLES = ("ink", "wash", "chalk", "flat")
CONCEPTS = [f"thing {i}" for i in range(40)]


def draw(concept: str, style: str) -> Image.Image:
  """Draws shapes at places that depend on the concept, a little on the style, as artists do."""
  rng = np.random.default_rng(int(fraction(concept) * 1e9))
  own = np.random.default_rng(int(fraction(concept + style) * 1e9))
  image = Image.new("RGB", (64, 64), "white")
  for _ in range(4):
    x, y = rng.uniform(4, 40, 2) + own.uniform(-4, 4, 2)
    width, height = rng.uniform(10, 30, 2)
    color = np.clip(rng.integers(0, 255, 3) + 60 * STYLES.index(style) - 90, 0, 255)
    outline = "black" if style == "ink" else None
    shape = ImageDraw.Draw(image).ellipse if rng.random() < 0.5 else ImageDraw.Draw(image).rectangle
    shape((x, y, x + width, y + height), fill=tuple(map(int, color)), outline=outline)
  return image


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
  folder, lines = tmp_path_factory.mktemp("drawings"), []
  for n, concept in enumerate(CONCEPTS):
    for m, style in enumerate(STYLES):
      heldout = "concept" if n < 3 and not m else "pair" if n >= 3 and n % 4 == m else ""
      split = "heldout" if heldout else "bank" if n < 3 else "train"
      facts = {"concept": concept, "style": style, "heldout": heldout}
      line = {"key": f"{n}/{m}", "image": f"{n}.{m}.png", "caption": f"{concept}, {style} style"}
      draw(concept, style).save(folder / line["image"])
      lines.append({**line, "split": split, "facts": facts})
  (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return drawing_judge.Drawings.read(folder, SIDE)


def through_a_good_tokenizer(images):
  """Blurs, rounds colors and moves by a pixel."""
  padded = np.pad(images.astype(int), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
  blurred = sum(padded[:, i : i + SIDE, j : j + SIDE] for i in (0, 1) for j in (0, 1)) / 4
  return (blurred // 16 * 16 + 8).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("options", drawing_judge.JUDGES, ids=["cells", "histograms"])
def test_judges_accept_true_drawings_and_reject_those_of_another_pair(drawings, options):
  judge, all_of_them = drawing_judge.Judge(drawings.images, *options), np.arange(160)
  shown = judge.nearest(through_a_good_tokenizer(drawings.images))
  right = drawing_judge.verdicts(drawings, shown, all_of_them)
  assert right["pair"].mean() >= 0.95
  others = drawing_judge.verdicts(drawings, shown, np.roll(all_of_them, 7))
  assert others["pair"].mean() == 0
  blank = judge.nearest(np.full_like(drawings.images, 255))
  assert len(set(blank)) == 1


def test_a_drawing_of_another_style_is_the_right_concept_only(drawings):
  judge = drawing_judge.Judge(drawings.images, *drawing_judge.JUDGES[0])
  asked, shown = np.array([0, 0, 0]), judge.nearest(drawings.images[[0, 1, 4]])
  assert {k: x.tolist() for k, x in drawing_judge.verdicts(drawings, shown, asked).items()} == {
    "pair": [True, False, False],
    "concept": [True, True, False],
    "style": [True, False, True],
  }


def test_every_shift_within_the_tolerance_is_free(drawings):
  moved = np.roll(drawings.images[:20], 1, 2)
  padded = np.pad(drawings.images[:20], ((0, 0), (0, 0), (1, 0), (0, 0)), "edge")[:, :, :-1]
  judge, strict = (drawing_judge.Judge(drawings.images, drawing_judge.lab_cells, n) for n in (1, 0))
  own = np.arange(20), np.arange(20)
  assert judge.distances(padded)[own].max() < strict.distances(padded)[own].mean()
  assert (judge.nearest(moved) == own[0]).mean() >= 0.95


def test_held_out_drawings_are_chosen_by_hash_and_more_contain_fewer(drawings):
  few, more, every = (illustrations.chosen(drawings, "pair", n) for n in (5, 20, 0))
  assert len(few) == 5
  assert few.tolist() != every[:5].tolist()
  assert set(few) < set(more) < set(every)
  assert len(every) == 37
  assert set(drawings.splits[every]) == {"heldout"}
  assert not set(drawings.concepts[every]) & set(
    drawings.concepts[illustrations.chosen(drawings, "concept", 0)]
  )


def test_means_do_not_contain_held_out_drawings(drawings):
  asked = illustrations.chosen(drawings, "pair", 3)
  before = illustrations.mean_drawings(drawings, asked)
  changed = drawings.images.copy()
  changed[drawings.splits == "heldout"] = 0
  other = drawing_judge.Drawings(**{**vars(drawings), "images": changed})
  after = illustrations.mean_drawings(other, asked)
  assert list(before) == list(illustrations.MEANS)
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])
  i = asked[0]
  rest = [j for j in range(160) if j != i and drawings.concepts[j] == drawings.concepts[i]]
  known = np.flatnonzero(drawings.splits != "heldout")
  of_style = [j for j in known if drawings.styles[j] == drawings.styles[i]]
  concept, style, overall = (drawings.images[some].mean(0) for some in (rest, of_style, known))
  for name, mean in zip(illustrations.MEANS, (concept, style, concept + style - overall)):
    np.testing.assert_allclose(before[name][0], mean.clip(0, 255), atol=0.51)


def test_chance_is_the_share_of_equal_names(drawings):
  asked = illustrations.chosen(drawings, "pair", 0)
  assert illustrations.chance(drawings, asked) == {
    "pair": 1 / 160,
    "concept": pytest.approx(4 / 160),
    "style": pytest.approx(1 / 4),
  }


def test_a_folder_without_records_is_refused_in_one_sentence(tmp_path):
  with pytest.raises(UserError, match="has no records of drawings"):
    drawing_judge.Drawings.read(tmp_path, SIDE)
  (tmp_path / "pairs.jsonl").write_text('{"key": "a", "image": "a.png", "caption": "a"}\n')
  with pytest.raises(UserError, match="name the folder in --data"):
    drawing_judge.Drawings.read(tmp_path, SIDE)
