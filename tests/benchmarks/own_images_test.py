import numpy as np
from PIL import Image
import pytest

from benchmarks.evidence import own_images
from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.stages.shards import Runner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs():
  return own_images.pairs()[:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
  folder = tmp_path_factory.mktemp("images")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(own_images, "pairs", lambda: pairs)
    own_images.make(folder)
  return folder


@pytest.mark.parametrize("layout", ["sidecars", "tar", "jsonl"])
def test_each_layout_has_the_same_pairs_and_no_mistake_is_taken_for_one(
  folder, tmp_path, pairs, layout
):
  config = RawConfig(source=str(folder / layout), resolution=16, max_rejected=0.2)
  parts = ingest.parts_of(config)
  summary = ingest.prepare(config, parts, tmp_path, Runner("local", "", 1, 1.0))
  found = [p for s in ("train", "heldout") for p in reader.read_pairs(tmp_path, s)]
  captions = sorted(pair.caption for pair in found)
  # One of the bad files is a JPEG with a wrong suffix. JSONL accepts it, because its content is
  # valid.
  taken = {"sidecars": [], "tar": [], "jsonl": ["a red disc at the left"]}[layout]
  assert captions == sorted([*(fact.caption for _, fact, _ in pairs), *taken])
  assert summary["rejected_unreadable_image"] == 4
  assert summary["rejected_long_caption"] == 1


@pytest.mark.slow
def test_the_rule_sees_color_and_shape_of_every_image(pairs):
  images, facts = [image for *_, image in pairs], [fact for _, fact, _ in pairs]
  right = {"color": 1.0, "shape": 1.0, "both": 1.0}
  assert own_images.shares(images, facts) == right
  assert own_images.shares([image.resize((48, 48)) for image in images], facts) == right
  other = [facts[-1], *facts[:-1]]
  assert own_images.shares(images, other)["both"] < 0.2


def test_an_image_without_a_color_shows_nothing():
  assert own_images.seen(own_images.background(np.random.default_rng(0))) == ("", "")
  plain = Image.new("RGB", (48, 48), (200, 200, 200))
  assert own_images.seen(plain) == ("", "")
  filled = Image.new("RGB", (48, 48), own_images.COLORS["red"])
  assert own_images.seen(filled) == ("red", "")


def test_the_nearest_caption_shares_most_words():
  others = ["a red disc at the left", "a blue star at the top", "top: one red star"]
  assert own_images.nearest_caption("a blue disc at the top", others) == 1
  assert own_images.nearest_caption("top: one red disc", others) == 2
