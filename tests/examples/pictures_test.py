"""Tests that pictures for the image tokenizer show nothing held out, nor a near copy of it."""

import collections
import json
import pathlib

import matplotlib
import numpy as np
from PIL import Image
import pytest

from examples.illustrations import sets
from examples.pictures import compose, make_data, sources
from examples.pictures.sources import Drawing, Font, Origin, Photograph
from tests.examples.illustrations_test import body, pack

COUNTS = dict.fromkeys(make_data.PICTURES, 12)
THINGS = [f"{a}{b}" for a in ("ax", "bo", "cu", "dri") for b in "bcdnr"]
HELD = ("axb", "axc")  # Concepts. A pair is "boc" in the style Noto.


def svg(content):
  return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{content}</svg>'


def drawing(package, name, kind="emoji", content=None):
  return Drawing(f"{package}/{name}", kind, svg(content or body(f"{name} {package}")), ORIGIN)


ORIGIN = Origin("MIT", "A", "https://a.org")


def all_drawings():
  found = [drawing(style, name) for style in ("noto", "twemoji") for name in THINGS]
  found += [drawing("streamline-emojis", name) for name in THINGS]
  found += [drawing("flat-color-icons", name, "icon") for name in ("gub", "gud")]
  found += [drawing("icon-park", name, "icon") for name in ("hib", "big-axc-left", "hid")]
  found += [drawing("openclipart", name, "clip art") for name in ("x/one_ann_01", "x/two_ann_02")]
  # Copies: of a drawing of a held-out concept, of the held-out pair, and of the artist.
  found.append(drawing("openclipart", "x/copy", "clip art", body("axb noto", copy=True)))
  found.append(drawing("noto", "pairtwin", content=body("boc noto", copy=True)))
  found.append(drawing("twemoji", "artisttwin", content=body("cub streamline-emojis", copy=True)))
  bar = '<rect x="4" y="2" width="3" height="9" fill="currentColor"/>'
  found.append(drawing("material-symbols", "bar", "one color", bar))
  return [*found, Drawing("noto/broken", "emoji", "<svg", ORIGIN)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("illustrations")
  facts = [(name, "Twemoji", "concept") for name in HELD] + [("boc", "Noto", "pair")]
  lines = [{"facts": dict(zip(("concept", "style", "heldout"), fact))} for fact in facts]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  drawn = make_data.Drawn(all_drawings(), 2)
  files = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  names = ("DejaVuSans", "DejaVuSerif")
  fonts = [Font(name, (files / f"{name}.ttf").read_bytes(), ORIGIN) for name in names]
  rng = np.random.default_rng(0)
  names = ("skimage/data/coffee.png", *sources.HELD_OUT_PHOTOGRAPHS)
  images = [Image.fromarray(rng.integers(0, 256, (90, 80, 3), np.uint8)) for _ in names]
  photographs = [Photograph(name, image, ORIGIN) for name, image in zip(names, images)]
  aliases = {"reynard": "bod"}
  icons = [sets.IconSet("Noto", "MIT", "A", "https://a.org", {}, aliases, {})]
  groups = make_data.held_out(drawn.drawings, folder, icons)
  return make_data.Inputs(drawn, groups, fonts, photographs)


@pytest.fixture(scope="module")
def near(inputs):
  return make_data.near_heldout(inputs.drawn.fingerprints(2), np.array(inputs.groups) != "")


@pytest.fixture(scope="module")
def data(inputs, near, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  make_data.write(folder, inputs, near, COUNTS)
  return folder, [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def shown(lines, split):
  return {name for line in lines if line["split"] == split for name in line["facts"]["of"]}


def test_training_shows_nothing_held_out_and_no_near_copy_of_it(inputs, data):
  train, heldout = shown(data[1], "train"), shown(data[1], "heldout")
  assert not train & heldout
  others = {f"{style}/{name}" for style in ("noto", "twemoji") for name in THINGS}
  others -= {f"{style}/{name}" for style in ("noto", "twemoji") for name in HELD} | {"noto/boc"}
  others |= {"icon-park/hib", "icon-park/hid", "material-symbols/bar", "DejaVuSans"}
  others |= {"openclipart/x/one_ann_01", "openclipart/x/two_ann_02", "skimage/data/coffee.png"}
  assert train == others
  assert {"noto/axb", "twemoji/axc", "noto/boc", "flat-color-icons/gub"} <= heldout
  assert {"streamline-emojis/cub", "DejaVuSerif", *sources.HELD_OUT_PHOTOGRAPHS} <= heldout
  assert "noto/broken" not in {drawing.key for drawing in inputs.drawn.drawings}


@pytest.mark.parametrize(
  "name",
  ["noto/axb", "noto/boc", "noto/pairtwin", "DejaVuSerif", sources.HELD_OUT_PHOTOGRAPHS[1]],
)
def test_the_check_passes_and_would_find_a_leak(name, inputs, near, data, tmp_path):
  make_data.check(data[0], inputs, near)
  leak = {**data[1][0], "facts": {"kind": "emoji", "of": [name]}}
  lines = [*data[1], leak]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  with pytest.raises(make_data.LeakError, match=name):
    make_data.check(tmp_path, inputs, near)


def test_records_state_kind_license_and_size(data):
  folder, lines = data
  found = collections.Counter((line["split"], line["facts"]["kind"]) for line in lines)
  assert all(found["train", kind] == count for kind, count in COUNTS.items())
  assert {kind for split, kind in found if split == "heldout"} == {
    *("drawing", "artist", "set", "text", "photograph")
  }
  assert {line["license"] for line in lines} == {"MIT", "CC0-1.0"}  # Textures show nobody's work.
  for line in lines:
    side = 64 if line["split"] == "train" else 128
    with Image.open(folder / line["image"]) as image:
      assert image.size == (side, side)
      assert line["caption"]
  assert (folder / "ATTRIBUTION.md").read_text() == "- A: MIT, https://a.org\n"


def test_a_window_on_a_plane_of_drawings():
  images = [np.full((128, 128, 4), 255, np.uint8) for _ in range(4)]
  for image, value in zip(images, (10, 20, 30, 40)):
    image[..., 0] = value
  layout = compose.Layout(48, 2, 2, 8, 32, Image.Resampling.BOX)
  found = compose.window(images, layout)[..., 0]
  assert found.shape == (64, 64)
  expected = np.array([[10, 20], [30, 40]]).repeat([40, 24], 0).repeat([16, 48], 1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(20))
def test_random_windows_are_full(seed):
  layout = compose.Layout.random(np.random.default_rng(seed))
  images = [np.full((128, 128, 4), 9, np.uint8)] * (layout.rows * layout.columns)
  assert compose.window(images, layout).shape == (64, 64, 4)
  assert layout.rows * layout.side >= layout.top + 64


def test_alpha_mixes_a_drawing_and_its_ground():
  front = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], float)
  found = compose.over(front, np.full((1, 3, 3), 50.0))
  assert found.tolist() == [[[200, 100, 0], [50, 50, 50], [80, 60, 40]]]


def test_brands_and_skin_tones_are_left_out(tmp_path):
  names = dict.fromkeys(("fox", "hand-dark", "logo-of-x", "crossed-sails"), body("x"))
  pack(tmp_path, "noto", names, {})
  (icons,) = sets.read(tmp_path, {"noto": "noto"})
  assert [d.key for d in sources.icons([icons], "icon")] == ["noto/crossed-sails", "noto/fox"]
  assert icons.of("Flags") == {"crossed-sails"}


@pytest.mark.parametrize("read", [sources.fonts, sources.clip_art, sources.photographs])
def test_a_missing_package_is_named(read, tmp_path):
  with pytest.raises(sets.SetError, match=r"npm pack .*|apt-get download|pip download"):
    list(read(tmp_path))
