import collections
import dataclasses
import itertools
import json

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.documents.encode import EncodeJob, encode_documents
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources import function
from cm3leon_jax.data.sources.records import SPLITS, RawPair
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from cm3leon_jax.vocab import VocabLayout
from examples.scenes import drawings
from examples.scenes import source as scenes
from examples.scenes.judge.leaks import leaks
from examples.scenes.options import CATEGORIES, COMMON, ScenesConfig
from examples.scenes.world import (
  HELDOUT_COLOR,
  Scene,
  bank_scenes,
  rare_objects,
  rare_place,
)
from tests.refusals import refused

RAW = RawConfig(source=f"{scenes.__file__}:records", resolution=48)
FEW = ScenesConfig(train=500, heldout=140, bank=220, rare_objects=20)


class Letters:
  def encode_batch(self, texts):
    return [np.array([ord(c) + 8 for c in text], np.int32) for text in texts]


class Places:
  """Fake tokenizer: the four codes are the blue values in the middle of the four places."""

  def encode(self, images):
    return images[:, 12::24, 12::24, 2].reshape(len(images), 4)


def prepare(config, folder, raw=RAW):
  raw = dataclasses.replace(raw, options=dataclasses.asdict(config))
  return ingest.prepare(raw, ingest.parts_of(raw), folder, Runner())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes a raw folder of FEW scenes in shards of 200; returns folder and summary."""
  out = tmp_path_factory.mktemp("raw")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(function, "PART_RECORDS", 200)
    return out, prepare(FEW, out)


def test_a_record():
  pair = scenes.pair(ScenesConfig(), "train", 2)
  assert pair == RawPair(
    key="scenes/train/0000002",
    image="cyan cactus top right, red scissors top left",
    caption="an image of red scissors left of a cyan cactus",
    source="https://pictogrammers.com/library/mdi",
    license="Apache-2.0",
    attribution="Pictogrammers, Material Design Icons 7",
    group="cyan cactus, red scissors",
    split="train",
    concept="cyan cactus top right, red scissors top left",
    facts={
      "tag": "position",
      "heldout": "",
      "include": [
        {"class": "cactus", "count": 1, "color": "cyan"},
        {"class": "scissors", "count": 1, "color": "red", "position": ["left of", 0]},
      ],
      "exclude": [],
      "objects": [
        {"class": "scissors", "color": "red", "place": "top left", "box": [2, 2, 22, 22]},
        {"class": "cactus", "color": "cyan", "place": "top right", "box": [30, 4, 42, 21]},
      ],
      "counts": {"scissors": 1, "cactus": 1},
      "relations": [["scissors", "left of", "cactus"], ["cactus", "right of", "scissors"]],
    },
  )
  counting = scenes.pair(ScenesConfig(), "heldout", 1199)
  assert counting.caption == "we see two pears"
  assert counting.facts["counts"] == {"pear": 2}
  assert counting.facts["exclude"] == [{"class": "pear", "count": 3}]


@pytest.mark.parametrize("split", SPLITS)
def test_a_record_depends_on_seed_and_index_alone(split):
  few, many = (ScenesConfig(train=n, heldout=n, bank=n) for n in (100, 2_000))
  for index in (0, 1, 57, 99):
    assert scenes.pair(few, split, index) == scenes.pair(many, split, index)
  assert scenes.pair(many, split, 1_999).key == f"scenes/{split}/0001999"
  other = ScenesConfig(seed=1)
  records = [[scenes.pair(c, split, i).image for i in range(40)] for c in (few, other)]
  assert records[0] != records[1] or split == "bank"  # The bank does not depend on the seed.


def test_another_style_has_the_same_records_and_other_images(tmp_path):
  config = ScenesConfig(train=30, heldout=14, bank=5, rare_objects=20)
  prepare(config, tmp_path / "filled")
  prepare(dataclasses.replace(config, style="outlined"), tmp_path / "outlined")
  for split, count in zip(SPLITS, (30, 14, 5)):
    pairs, others = (
      [dataclasses.replace(pair, image="") for pair in reader.read_pairs(tmp_path / style, split)]
      for style in ("filled", "outlined")
    )
    assert pairs == others
    images = reader.open_images(tmp_path / "outlined", split, 48)[np.arange(count)]
    for pair, image in zip(pairs, images):
      scene = Scene.parse(pair.concept)
      np.testing.assert_array_equal(image, drawings.render(scene, "outlined"))
      assert (image != drawings.render(scene)).any()


def test_the_stage_says_what_it_wrote(folder):
  out, summary = folder
  assert (summary["shards"], summary["train_pairs"], summary["heldout_pairs"]) == (6, 500, 140)
  counts = collections.Counter()
  for pair in (pair for split in SPLITS for pair in reader.read_pairs(out, split)):
    counts["_".join(filter(None, (pair.split, pair.facts["tag"], pair.facts["heldout"])))] += 1
  assert (summary["bank_pairs"], counts["bank_colors"], counts["bank_rare"]) == (220, 160, 60)
  heldout = {name: number for name, number in counts.items() if name.startswith("heldout")}
  for category in CATEGORIES:
    numbers = [n for name, n in heldout.items() if name.startswith(f"heldout_{category}_")]
    assert sum(numbers) == 20
    assert max(numbers) - min(numbers) <= 1
    assert len(numbers) == {"rare": 1, "two_object": 3, "position": 3, "color_attr": 3}.get(
      category, 2
    )


def test_images_show_what_their_facts_say(folder):
  for pair in reader.read_pairs(folder[0], "heldout"):
    with Image.open(pair.image) as stored:
      assert (stored.format, stored.size) == ("PNG", (48, 48))
      image = np.asarray(stored)
    np.testing.assert_array_equal(image, drawings.render(Scene.parse(pair.concept)))
    objects = pair.facts["objects"]
    assert sum(pair.facts["counts"].values()) == len(objects)
    outside = np.ones((48, 48), bool)
    for found in objects:
      left, top, right, bottom = found["box"]
      assert (image[top:bottom, left:right] != 255).any()
      outside[top:bottom, left:right] = False
    assert (image[outside] == 255).all()


def test_relations_are_all_that_hold(folder):
  for pair in reader.read_pairs(folder[0], "train"):
    places = {found["class"]: found["place"] for found in pair.facts["objects"]}
    expected = set()
    for a, b in itertools.permutations(places, 2):
      for word, other, relation in (
        ("left", "right", "left of"),
        ("right", "left", "right of"),
        ("top", "bottom", "above"),
        ("bottom", "top", "below"),
      ):
        if word in places[a] and other in places[b]:
          expected.add((a, relation, b))
    assert set(map(tuple, pair.facts["relations"])) == expected


def test_training_shows_nothing_that_is_held_out(folder):
  report = leaks(folder[0])
  assert (report.heldout, report.train) == (140, 500)
  assert report.leaked == {"scene": 0, "pair": 0, "objects": 0, "rare": 0}
  train, heldout = (reader.read_pairs(folder[0], split) for split in SPLITS[:2])
  assert not {p.concept for p in train} & {p.concept for p in heldout}
  for pair in train:
    for shown in pair.facts["objects"]:
      assert HELDOUT_COLOR.get(shown["class"]) != shown["color"]
  of_kind = collections.defaultdict(list)
  for pair in heldout:
    of_kind[pair.facts["heldout"]].append(pair.facts)
  assert all(
    any(HELDOUT_COLOR.get(o["class"]) == o["color"] for o in facts["objects"])
    for facts in of_kind["pair"]
  )
  trained = {o["class"] for pair in train for o in pair.facts["objects"]}
  assert not {o["class"] for facts in of_kind["rare"] for o in facts["objects"]} & trained
  seen = {frozenset(pair.facts["counts"]) for pair in train}
  assert not {frozenset(facts["counts"]) for facts in of_kind["objects"]} & seen
  assert set(of_kind["scene"][0]["counts"]) <= set(COMMON)


def test_the_bank_alone_shows_the_rare_objects_that_are_held_out(folder):
  of_split = {split: reader.read_pairs(folder[0], split) for split in SPLITS}
  shown = {
    split: {
      (o["class"], o["color"])
      for pair in pairs
      if pair.facts["tag"] == "rare"
      for o in pair.facts["objects"]
    }
    for split, pairs in of_split.items()
  }
  objects = {split: {name for name, _ in some} for split, some in shown.items()}
  assert objects["bank"] == set(rare_objects(FEW))
  assert not shown["bank"] & (shown["train"] | shown["heldout"])
  assert not objects["heldout"] & objects["train"]
  common = [pair for pair in of_split["bank"] if pair.facts["tag"] == "colors"]
  alone = {
    split: {p.concept for p in pairs if len(p.facts["objects"]) == 1}
    for split, pairs in of_split.items()
  }
  assert len(common) == 4 * len(FEW.objects)
  assert not {pair.concept for pair in common} & (alone["train"] | alone["heldout"])
  for pair in of_split["bank"]:
    (o,) = pair.facts["objects"]
    assert pair.caption.endswith(f"{o['color']} {o['class']} at the {o['place']}")
  first = collections.defaultdict(list)
  for scene in bank_scenes(FEW)[160 : 180 + 3 * len(objects["heldout"])]:
    (placed,) = scene.objects
    first[placed.object].append(placed.place)
  for name, places in first.items():
    assert places == ([rare_place(name)] if name not in objects["heldout"] else places)
    assert len(set(places)) == (4 if name in objects["heldout"] else 1)


def test_a_held_out_scene_in_the_bank_is_a_leak(folder, tmp_path):
  pairs = reader.read_pairs(folder[0], "heldout")
  for kind in ("scene", "pair", "objects"):
    facts = next(pair.facts for pair in pairs if pair.facts["heldout"] == kind)
    bank = {"split": "bank", "facts": {**facts, "heldout": ""}}
    assert leaks(write_facts(tmp_path / kind, facts, bank)).leaked[kind] == 1


@pytest.mark.parametrize("kind", ["scene", "pair", "objects", "rare"])
def test_a_planted_leak_is_found(folder, tmp_path, kind):
  """Adds a held-out scene to training, at other places unless the kind is `scene`."""
  facts = next(
    p.facts
    for p in reader.read_pairs(folder[0], "heldout")
    if p.facts["heldout"] == kind and (kind != "objects" or p.facts["tag"] == "two_object")
  )
  objects = [dict(o) for o in facts["objects"]]
  if kind != "scene":
    for o in objects:
      o["place"] = o["place"].replace("top", "middle").replace("bottom", "top")
  if kind in ("objects", "rare"):
    for o in objects:
      o["color"] = "white"
  train = {"split": "train", "facts": {**facts, "heldout": "", "objects": objects}}
  report = leaks(write_facts(tmp_path, facts, train))
  assert report.leaked == {**dict.fromkeys(report.leaked, 0), kind: 1}
  assert report.first == [f"heldout 'h' ({kind}): h"]


def write_facts(folder, heldout, other):
  """Writes a raw folder with two records: a held-out record with facts, and the record `other`."""
  source = folder / "in"
  source.mkdir(parents=True)
  Image.new("RGB", (48, 48)).save(source / "a.png")
  records = [{"key": "h", "split": "heldout", "facts": heldout}, {"key": "t", **other}]
  lines = [json.dumps({"image": "a.png", "caption": "c", **record}) for record in records]
  (source / "pairs.jsonl").write_text("\n".join(lines))
  config = RawConfig(source=str(source), resolution=48)
  ingest.prepare(config, ingest.parts_of(config), folder / "raw", Runner())
  return folder / "raw"


def test_documents_keep_the_facts_and_need_no_texts(folder, tmp_path):
  vocab = VocabLayout(num_special=8, text_size=280, image_size=256)
  tokenizers = (Letters(), Places())
  job = EncodeJob(str(folder[0]), str(tmp_path), lambda: tokenizers, vocab, 48, 512)
  encode_documents(job, {}, Runner())
  for split in SPLITS:
    assert len(DocumentStore(tmp_path / f"{split}_texts", vocab)) == 0
    store = DocumentStore(tmp_path / f"{split}_pairs", vocab)
    pairs = reader.read_pairs(folder[0], split)
    assert len(store) == len(pairs)
    for i in (0, 17, len(pairs) - 1):
      assert store[i].facts == pairs[i].facts
      assert (store[i].concept, store[i].group) == (pairs[i].concept, pairs[i].group)


@pytest.mark.parametrize(
  ("fields", "fact"),
  [
    (
      {"objects": ("bell",), "colors": (HELDOUT_COLOR["bell"],), "categories": ("colors",)},
      "colors",
    ),
    ({"rare_objects": 5, "bank": 301}, "301"),
    ({"categories": ("rare",), "rare_objects": 1}, "rare"),
  ],
)
def test_a_world_that_cannot_be_split_is_refused(fields, fact):
  with refused(UserError, fact):
    next(scenes.records(**fields))
