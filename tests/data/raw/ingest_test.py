import io
import json
import shutil

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources import records as records_lib
from cm3leon_jax.data.sources.records import SPLITS, RawInterleaved
from cm3leon_jax.data.sources.splits import split_of
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.refusals import refused

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(color, size=(4, 4), mode="RGB") -> bytes:
  buffer = io.BytesIO()
  Image.new(mode, size, color).save(buffer, "png")
  return buffer.getvalue()


def red(key, **fields) -> dict:
  return {"key": key, "image": "red.png", "caption": "a", **fields}


@pytest.fixture
def source(tmp_path):
  """Writes 40 pairs and 2 texts; returns a function that replaces line `i` of pairs.jsonl."""
  folder = tmp_path / "source"
  folder.mkdir()
  (folder / "red.png").write_bytes(png(RED))
  lines = [json.dumps(red(f"k{i}", caption=f"red number {i}", width=4)) for i in range(40)]
  (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
  texts = [
    {"key": "t0", "text": "Some text.", "license": "MIT"},
    {"key": "t1", "text": "More.", "split": "heldout"},
  ]
  (folder / "texts.jsonl").write_text("".join(json.dumps(t) + "\n\n" for t in texts))
  return folder


def replace_line(folder, i, line, name="pairs.jsonl"):
  lines = (folder / name).read_text().split("\n")
  lines[i] = line if isinstance(line, str) else json.dumps(line)
  (folder / name).write_text("\n".join(lines))


def prepare(source, tmp_path, **kwargs):
  out, config = tmp_path / "raw", RawConfig(source=str(source), **{"resolution": 8, **kwargs})
  return ingest.prepare(config, ingest.parts_of(config), out, Runner()), out


def test_a_folder_of_ones_own(source, tmp_path):
  own = red("own", caption="ein Ärmel", split="heldout", license="CC0-1.0")
  replace_line(source, 0, own)
  summary, out = prepare(source, tmp_path, heldout_fraction=0.3)
  train, heldout = (reader.read_pairs(out, split) for split in SPLITS[:2])
  assert len(train) + len(heldout) == 40
  assert (len(train), len(heldout)) == (summary["train_pairs"], summary["heldout_pairs"])
  assert heldout[0].key == heldout[0].concept == "own"
  assert (heldout[0].caption, heldout[0].license, heldout[0].source) == ("ein Ärmel", "CC0-1.0", "")
  assert 5 <= len(heldout) <= 20
  assert [t.key for t in reader.read_texts(out, "heldout")][-1] == "t1"
  image = reader.load_image(train[-1].image, 8)
  assert (image == np.array(RED, np.uint8)[None, None]).all()
  with Image.open(train[-1].image) as stored:
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (8, 8))


def test_a_concept_lies_in_one_split(source, tmp_path):
  for i in range(40):
    replace_line(source, i, red(f"k{i}", concept=f"concept {i // 8}"))
  _, out = prepare(source, tmp_path, heldout_fraction=0.5)
  train, heldout = ({p.concept for p in reader.read_pairs(out, split)} for split in SPLITS[:2])
  assert len(train) + len(heldout) == 5
  assert train
  assert heldout


def test_what_is_prepared_can_be_prepared_again(source, tmp_path):
  first, out = prepare(source, tmp_path)
  again, second = prepare(out, tmp_path / "again")
  scaled = {"smallest_image": [8, 8], "largest_image": [8, 8]}
  assert again == {**first, **scaled}
  for name in ("pairs.jsonl", "texts.jsonl"):
    assert (second / "000000" / name).read_text() == (out / "000000" / name).read_text()


def test_a_few_wrong_records_are_left_out_and_listed(source, tmp_path):
  replace_line(source, 2, '{"key": "x",')
  replace_line(source, 5, {"key": "y", "image": "pairs.jsonl", "caption": "no image"})
  summary, out = prepare(source, tmp_path, max_rejected=0.05)
  assert (summary["rejected_malformed_record"], summary["rejected_unreadable_image"]) == (1, 1)
  assert summary["train_pairs"] + summary["heldout_pairs"] == 38
  rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
  found = [(line["key"], line["reason"]) for line in rejected]
  assert found == [("", "malformed_record"), ("y", "unreadable_image")]
  assert rejected[0]["file"].endswith("pairs.jsonl")
  with refused(UserError, "max_rejected", "2 of 42"):
    prepare(source, tmp_path, max_rejected=0.04)
  assert len((out / "rejected.jsonl").read_text().splitlines()) == 2


def test_a_wrong_tag_of_an_image_prints_no_warning(source, tmp_path):
  """A warning raises an error in tests, so that the images would be left out."""
  tag = bytes.fromhex("4d4d002a00000008 0001 010f0002000013880000001a 00000000")
  Image.new("RGB", (4, 4)).save(source / "red.png", exif=b"Exif\0\0" + tag)
  with pytest.warns(UserWarning, match="larger"):
    reader.load_image(str(source / "red.png"), 8)
  assert "rejected_unreadable_image" not in prepare(source, tmp_path)[0]


def test_records_are_chosen_by_license(source, tmp_path):
  replace_line(source, 0, red("free", license="CC0-1.0"))
  replace_line(source, 1, red("other", license="secret"))
  summary, out = prepare(
    source, tmp_path, licenses=("CC0-1.0", "MIT"), default_license="MIT", default_attribution="us"
  )
  records = [r for split in SPLITS for r in reader.read_pairs(out, split)]
  assert summary["other_licenses"] == 1
  assert {r.license for r in records if r.key != "free"} == {"MIT"}
  assert {r.attribution for r in records} == {"us"}
  assert "free" in {r.key for r in records}
  assert "other" not in {r.key for r in records}
  assert not any(name.startswith("rejected") for name in summary)
  with refused(UserError, "licenses"):
    prepare(source, tmp_path, licenses=("CC0-1.1",), default_license="secret")


def test_origins_are_counted(source, tmp_path, monkeypatch):
  for i in range(4):
    replace_line(source, i, red(f"a{i}", license="CC0-1.0", attribution="Ada"))
  replace_line(source, 4, red("b", license="CC0-1.0", attribution="Bob"))
  _, out = prepare(source, tmp_path)
  origins = reader.read_index(out)["origins"]
  ada = {"kind": "pairs", "source": "", "license": "CC0-1.0", "attribution": "Ada", "records": 4}
  assert origins[:2] == [{**ada, "license": "", "attribution": "", "records": 35}, ada]
  assert sum(origin["records"] for origin in origins) == 42
  _, cropped = prepare(source, tmp_path / "cropped", crops=2)
  kinds = [origin["kind"] for origin in reader.read_index(cropped)["origins"]]
  assert (kinds.count("pairs"), "crops" in kinds) == (3, True)
  monkeypatch.setattr(records_lib, "MOST_ORIGINS", 1)
  few = records_lib.origin_counts(origins)
  others = {**ada, "source": "others", "attribution": "others", "records": 5}
  assert few[:2] == [origins[0], others]


def interleaved(*segments, **about):
  return json.dumps({"key": "page", "segments": segments, **about}) + "\n"


def test_interleaved_documents_keep_their_order(source, tmp_path):
  (source / "blue.png").write_bytes(png(BLUE))
  segments = [{"text": "One."}, {"image": "blue.png"}, {"image": "red.png"}, {"text": "Two."}]
  (source / "interleaved.jsonl").write_text(interleaved(*segments, split="train", license="MIT"))
  summary, out = prepare(source, tmp_path)
  assert (summary["train_interleaved"], summary["heldout_interleaved"]) == (1, 0)
  (page,) = reader.read_shard(out, "000000", RawInterleaved, "train")
  assert (page.key, page.license) == ("page", "MIT")
  assert [next(iter(s)) for s in page.segments] == ["text", "image", "image", "text"]
  assert [s["text"] for s in page.segments if "text" in s] == ["One.", "Two."]
  colors = [reader.load_image(s["image"], 8)[0, 0].tolist() for s in page.segments if "image" in s]
  assert colors == [list(BLUE), list(RED)]
  again, _ = prepare(out, tmp_path / "again")
  scaled = {"smallest_image": [8, 8], "largest_image": [8, 8]}
  assert again == {**summary, **scaled}


def write_text_files(folder, names):
  folder.mkdir(exist_ok=True)
  for name in names:
    lines = [json.dumps({"text": f"{name} {i}", "split": "train"}) for i in range(3)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_every_file_is_a_shard_and_new_files_add_shards(tmp_path, monkeypatch):
  write_text_files(tmp_path / "in", "ab")
  summary, out = prepare(tmp_path / "in", tmp_path)
  assert (summary["shards"], summary["train_texts"]) == (2, 6)
  texts = [text.text for text in reader.read_texts(out, "train")]
  assert texts == [f"{name} {i}" for name in "ab" for i in range(3)]
  written = []
  write = ingest.write_shard

  def count(config, folder, *args):
    written.append(folder.name)
    return write(config, folder, *args)

  monkeypatch.setattr(ingest, "write_shard", count)
  before = reader.shards(out)
  write_text_files(tmp_path / "in", "c")
  assert prepare(tmp_path / "in", tmp_path)[0]["train_texts"] == 9
  assert written == ["000002"]
  assert {name: reader.shards(out)[name] for name in before} == before
  prepare(tmp_path / "in", tmp_path, heldout_fraction=0.5)
  assert written == ["000002", "000000", "000001", "000002"]


def test_a_file_edited_to_the_same_size_is_read_again(tmp_path):
  write_text_files(tmp_path / "in", "ab")
  _, out = prepare(tmp_path / "in", tmp_path)
  config = RawConfig(source=str(tmp_path / "in"))
  parts = ingest.parts_of(config)
  assert formats.digest_of(ingest.parts_of(config)) == formats.digest_of(parts)
  path = tmp_path / "in" / "b.jsonl"
  path.write_text(path.read_text().replace("b 1", "x 1"))
  again = ingest.parts_of(config)
  assert [part.bytes for part in again] == [part.bytes for part in parts]
  assert formats.digest_of(again) != formats.digest_of(parts)
  prepare(tmp_path / "in", tmp_path)
  assert [t.text for t in reader.read_texts(out, "train")][3:] == ["b 0", "x 1", "b 2"]


def test_damaged_records_of_a_shard_are_refused_and_made_again(tmp_path):
  write_text_files(tmp_path / "in", "ab")
  _, out = prepare(tmp_path / "in", tmp_path)
  index, path = (out / reader.INDEX).read_bytes(), out / "000001" / "texts.jsonl"
  path.write_text(path.read_text().replace("b 1", "x 1"))
  with refused(UserError, "texts.jsonl"):
    reader.read_texts(out, "train")
  shutil.rmtree(out / "000001")
  prepare(tmp_path / "in", tmp_path)
  assert [t.text for t in reader.read_texts(out, "train")][3:] == ["b 0", "b 1", "b 2"]
  assert (out / reader.INDEX).read_bytes() == index


def test_images_may_be_stored_as_jpeg(source, tmp_path):
  _, out = prepare(source, tmp_path, jpeg_quality=95, heldout_fraction=0.0)
  path = reader.read_pairs(out, "train")[0].image
  with Image.open(path) as stored:
    assert (path[-4:], stored.format, stored.size) == (".jpg", "JPEG", (8, 8))
  np.testing.assert_allclose(reader.load_image(path, 8)[4, 4], RED, atol=3)


def test_the_digest_of_a_shard_depends_on_its_images(source, tmp_path):
  digests = []
  for color in (RED, BLUE, BLUE):
    (source / "red.png").write_bytes(png(color, (5, 5)))
    _, out = prepare(source, tmp_path / str(len(digests)))
    digests.append(reader.shards(out)["000000"]["digest"])
  assert digests[0] != digests[1] == digests[2]


def test_images_are_made_square_as_configured(source, tmp_path):
  (source / "red.png").write_bytes(png(RED, (16, 8)))
  corner = {}
  for crop in ("center", "pad"):
    _, out = prepare(source, tmp_path / crop, crop=crop, heldout_fraction=0.0)
    image = reader.load_image(reader.read_pairs(out, "train")[0].image, 8)
    assert image[4, 4].tolist() == list(RED)
    corner[crop] = image[0, 0].tolist()
  assert corner == {"center": list(RED), "pad": [255, 255, 255]}


def test_splits_are_a_stable_share():
  names = [f"concept {i}" for i in range(4_000)]
  few = {n for n in names if split_of(n, 0.05) == "heldout"}
  more = {n for n in names if split_of(n, 0.1) == "heldout"}
  assert 150 < len(few) < 250
  assert few < more
  assert not any(split_of(n, 0.0) == "heldout" for n in names)
