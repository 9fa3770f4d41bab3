import io
import json

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.raw_pairs import RawConfig

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(color, size=(4, 4), mode="RGB") -> bytes:
  buffer = io.BytesIO()
  Image.new(mode, size, color).save(buffer, "png")
  return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
  """A folder of 40 pairs and 2 texts; function to replace line `i` of pairs.jsonl."""
  folder = tmp_path / "source"
  folder.mkdir()
  (folder / "red.png").write_bytes(png(RED))
  lines = [json.dumps({"key": f"k{i}", "image": "red.png", "caption": f"red number {i}", "width": 4}) for i in range(40)]
  (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
  texts = [{"key": "t0", "text": "Some text.", "license": "MIT"}, {"key": "t1", "text": "More.", "split": "heldout"}]
  (folder / "texts.jsonl").write_text("".join(json.dumps(t) + "\n\n" for t in texts))
  return folder


def replace_line(folder, i, line, name="pairs.jsonl"):
  lines = (folder / name).read_text().split("\n")
  lines[i] = line if isinstance(line, str) else json.dumps(line)
  (folder / name).write_text("\n".join(lines))


def prepare(source, tmp_path, **kwargs):
  out = tmp_path / "raw"
  return raw_pairs.prepare(RawConfig(source=str(source), resolution=8, **kwargs), out), out


def test_a_folder_of_ones_own(source, tmp_path):
  replace_line(source, 0, {"key": "own", "image": "red.png", "caption": "ein Ärmel", "split": "heldout", "license": "CC0-1.0"})
  summary, out = prepare(source, tmp_path, heldout_fraction=0.3)
  train, heldout = (raw_pairs.read_pairs(out, split) for split in raw_pairs.SPLITS)
  assert len(train) + len(heldout) == 40
  assert (len(train), len(heldout)) == (summary["train_pairs"], summary["heldout_pairs"])
  assert heldout[0].key == heldout[0].concept == "own"
  assert (heldout[0].caption, heldout[0].license, heldout[0].source) == ("ein Ärmel", "CC0-1.0", "")
  assert 5 <= len(heldout) <= 20
  assert [t.key for t in raw_pairs.read_texts(out, "heldout")][-1] == "t1"
  image = raw_pairs.load_image(train[-1].image, 8)
  assert (image == np.array(RED, np.uint8)[None, None]).all()
  with Image.open(train[-1].image) as stored:
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (8, 8))


def test_what_is_prepared_can_be_prepared_again(source, tmp_path):
  first, out = prepare(source, tmp_path)
  again = raw_pairs.prepare(RawConfig(source=str(out), resolution=8), tmp_path / "again")
  assert again == first
  for name in ("pairs.jsonl", "texts.jsonl"):
    assert (tmp_path / "again" / name).read_text() == (out / name).read_text()


def test_texts_are_optional(source, tmp_path):
  (source / "texts.jsonl").unlink()
  _, out = prepare(source, tmp_path)
  assert raw_pairs.read_texts(out, "train") == []


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"key": "x",', r"pairs.jsonl, line 3 is no valid JSON"),
    ([1], r"line 3 is list; every line must be one JSON object"),
    ({"key": "x", "image": "red.png"}, r"line 3, key 'x' has no field 'caption'"),
    ({"image": "red.png", "caption": "a"}, r"line 3 has no field 'key'"),
    ({"key": "x", "image": "red.png", "caption": " "}, r"line 3, key 'x': field 'caption' is empty"),
    ({"key": "x", "image": "red.png", "caption": 7}, r"line 3, key 'x': field 'caption' is 7; it must be a string"),
    ({"key": "x", "image": "red.png", "caption": "\ud83d"}, r"line 3, key 'x': field 'caption' holds half of a surrogate pair"),
    ({"key": "k0", "image": "red.png", "caption": "a"}, r"key 'k0' of .* stands there twice"),
    ({"key": "x", "image": "red.png", "caption": "a", "split": "test"}, r"split is 'test'; it must be 'train' or 'heldout'"),
    ({"key": "x", "image": "no.png", "caption": "a"}, r"key 'x': image 'no.png' does not exist"),
    ({"key": "x", "image": "pairs.jsonl", "caption": "a"}, r"key 'x': image .*pairs.jsonl cannot be read"),
  ],
)
def test_a_wrong_record_ends_in_one_sentence(source, tmp_path, line, message):
  replace_line(source, 2, line)
  with pytest.raises(UserError, match=message) as error:
    prepare(source, tmp_path)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "raw" / "pairs.jsonl").exists()


def test_a_few_wrong_records_are_left_out_and_listed(source, tmp_path):
  replace_line(source, 2, '{"key": "x",')
  replace_line(source, 5, {"key": "y", "image": "pairs.jsonl", "caption": "no image"})
  summary, out = prepare(source, tmp_path, max_rejected=0.05)
  assert (summary["rejected_malformed_record"], summary["rejected_unreadable_image"]) == (1, 1)
  assert summary["train_pairs"] + summary["heldout_pairs"] == 38
  rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
  assert [(r["key"], r["reason"]) for r in rejected] == [("", "malformed_record"), ("y", "unreadable_image")]
  assert rejected[0]["file"].endswith("pairs.jsonl")
  with pytest.raises(UserError, match=r"2 of 42 records .*\(malformed_record 1, unreadable_image 1\), more than .* 4.0%"):
    prepare(source, tmp_path, max_rejected=0.04)
  assert len((out / "rejected.jsonl").read_text().splitlines()) == 2


def test_records_are_chosen_by_licence(source, tmp_path):
  replace_line(source, 0, {"key": "free", "image": "red.png", "caption": "a", "license": "CC0-1.0"})
  replace_line(source, 1, {"key": "other", "image": "red.png", "caption": "a", "license": "secret"})
  summary, out = prepare(source, tmp_path, licenses=("CC0-1.0", "MIT"), default_license="MIT", default_attribution="us")
  records = [r for split in raw_pairs.SPLITS for r in raw_pairs.read_pairs(out, split)]
  assert summary["other_licenses"] == 1
  assert {r.license for r in records if r.key != "free"} == {"MIT"}
  assert {r.attribution for r in records} == {"us"}
  assert "free" in {r.key for r in records}
  assert "other" not in {r.key for r in records}
  assert not any(name.startswith("rejected") for name in summary)


def test_long_captions_are_rejected(source, tmp_path):
  with pytest.raises(UserError, match=r"40 of 42 records are wrong \(long_caption 40\).*key 'k0': the caption has 12 char"):
    prepare(source, tmp_path, max_caption_characters=11)


def test_wrong_sources_are_told(source, tmp_path):
  with pytest.raises(UserError, match=r"where no file is; it must be 'openmoji', or a folder"):
    prepare(tmp_path / "absent", tmp_path)
  (source / "pairs.jsonl").write_text("\n")
  (source / "texts.jsonl").unlink()
  with pytest.raises(UserError, match=r"holds no record that can be used"):
    prepare(source, tmp_path)
  (source / "pairs.jsonl").write_bytes(b'{"key": "\xff"}')
  with pytest.raises(UserError, match="is not UTF-8"):
    prepare(source, tmp_path)
  with pytest.raises(UserError, match=r"launch\.prepare_data"):
    raw_pairs.read_pairs(tmp_path / "absent", "train")


def test_load_image_scales_crops_and_puts_on_white(tmp_path):
  wide = Image.new("RGB", (24, 8), RED)
  wide.paste(BLUE, (8, 0, 16, 8))
  wide.save(tmp_path / "wide.png")
  assert (raw_pairs.load_image(tmp_path / "wide.png", 8) == np.array(BLUE, np.uint8)[None, None]).all()
  (tmp_path / "clear.png").write_bytes(png((0, 0, 0, 0), mode="RGBA"))
  assert (raw_pairs.load_image(tmp_path / "clear.png", 4) == 255).all()
  (tmp_path / "grey.png").write_bytes(png(7, mode="L"))
  assert (raw_pairs.load_image(tmp_path / "grey.png", 4) == 7).all()


def test_load_image_names_a_broken_file(tmp_path):
  (tmp_path / "half.png").write_bytes(png(RED, (64, 64))[:60])
  with pytest.raises(UserError, match=r"half.png cannot be read .* must be a PNG"):
    raw_pairs.load_image(tmp_path / "half.png", 8)


def test_load_images_keeps_the_order(tmp_path):
  for i in range(9):
    (tmp_path / f"{i}.png").write_bytes(png((i, 0, 0)))
  images = raw_pairs.load_images([tmp_path / f"{i}.png" for i in range(9)], 4, num_threads=3)
  assert images[:, 0, 0, 0].tolist() == list(range(9))
  assert raw_pairs.load_images([], 4, 3).shape == (0, 4, 4, 3)


def test_splits_are_a_stable_share():
  names = [f"concept {i}" for i in range(4_000)]
  few = {n for n in names if raw_pairs.split_of(n, 0.05) == "heldout"}
  more = {n for n in names if raw_pairs.split_of(n, 0.1) == "heldout"}
  assert 150 < len(few) < 250
  assert few < more
  assert not any(raw_pairs.split_of(n, 0.0) == "heldout" for n in names)


def test_openmoji_pairs(tmp_path):
  summary = raw_pairs.prepare(RawConfig(resolution=8, max_texts=40), tmp_path)
  train, heldout = (raw_pairs.read_pairs(tmp_path, split) for split in raw_pairs.SPLITS)
  assert summary["heldout_pairs"] == len(heldout) >= 200
  assert len(train) > 3_500
  assert summary["train_texts"] + summary["heldout_texts"] == 40
  assert not {p.concept for p in train} & {p.concept for p in heldout}
  assert {p.license for p in train} == {"CC-BY-SA-4.0"}
  assert all("OpenMoji" in p.attribution and p.group and p.source for p in train)
  cooks = {p.group for p in train + heldout if p.caption.startswith("woman cook")}
  assert len(cooks) == 1


@pytest.mark.parametrize(
  "values",
  [
    {"source": ""},
    {"resolution": 0},
    {"heldout_fraction": 1.0},
    {"max_texts": -1},
    {"num_threads": 0},
    {"format": "zip"},
    {"max_caption_characters": 0},
    {"max_rejected": 1.5},
  ],
)
def test_config_is_checked(values):
  with pytest.raises(ValueError, match=f"raw.{next(iter(values))} is"):
    RawConfig(**values)
