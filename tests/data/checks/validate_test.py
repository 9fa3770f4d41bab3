import json
import pathlib
import shutil

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.checks.validate import validate_raw, validate_shard, validate_store
from cm3leon_jax.data.documents.store import (
  DocumentStore,
  finish_store,
  write_documents,
  write_shard,
)
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.files.shards import Runner
from cm3leon_jax.runs import stages
from tests.data.documents.store_test import VOCAB, document, flip, image, same, text, write_stage
from tests.refusals import refused


def test_valid_shards_are_counted(tmp_path):
  write_documents(
    tmp_path, [document("a", text(9, 10)), document("b", text(9), image(300, 301))], VOCAB
  )
  assert validate_shard(tmp_path, "000000", VOCAB) == {"documents": 2, "segments": 3, "tokens": 5}


def test_a_store_is_validated_with_its_joined_token_counts(tmp_path):
  write_shard(tmp_path, "a", [document("a", text(9, 10))], VOCAB)
  write_shard(tmp_path, "b", [document("b", text(9), image(300, 301))], VOCAB)
  finish_store(tmp_path, ["a", "b"], VOCAB)
  store = DocumentStore(tmp_path, VOCAB)
  assert validate_store(store) == {"shards": 2, "documents": 2, "segments": 3, "tokens": 5}
  np.save(tmp_path / "token_counts.npy", store.token_counts + 1)
  with refused(UserError):
    validate_store(DocumentStore(tmp_path, VOCAB))


@pytest.mark.parametrize("stage", ["documents", "instructions"])
def test_the_command_that_writes_a_store_again_is_that_of_its_stage(tmp_path, stage):
  folder = tmp_path / stage / "train_a"
  write_documents(folder, [document("a", text(9, 10))], VOCAB)
  (folder / "000000.array_record").unlink()
  with refused(UserError):
    validate_shard(folder, "000000", VOCAB)


def test_a_flipped_bit_is_reported_or_harmless(tmp_path):
  originals = [
    document("a", text(*range(9, 200)), group="g"),
    document("b", text(9), image(300, 301)),
  ]
  write_documents(tmp_path, originals, VOCAB)
  records, noticed = tmp_path / "000000.array_record", 0
  used = [i for i, byte in enumerate(records.read_bytes()) if byte]  # The rest is padding.
  for position in used[::13]:
    flip(records, position)
    try:
      validate_shard(tmp_path, "000000", VOCAB)
    except UserError as error:
      assert "000000.array_record" in str(error)  # noqa: PT017
      noticed += 1
    else:  # Flips in the file's signature remain unnoticed, because no reader checks it.
      store = DocumentStore(tmp_path, VOCAB)
      for i, original in enumerate(originals):
        same(original, store[i])
    flip(records, position)
  assert noticed > len(used[::13]) // 2


@pytest.mark.parametrize(
  "others",
  [
    [document("a", text(9), group="g")],
    [document("a", text(9, 9), group="g"), document("b", text(9))],
    [document("a", text(9), group="g"), document("b", image(300))],
    [document("a", text(9), group="h"), document("b", text(9))],
    [document("a", text(9), group="g", concept="c"), document("b", text(9))],
    [document("a", text(9), group="g"), document("b", text(10))],
  ],
)
def test_lengths_of_other_documents_are_refused(tmp_path, others):
  write_documents(
    tmp_path / "one", [document("a", text(9), group="g"), document("b", text(9))], VOCAB
  )
  write_documents(tmp_path / "other", others, VOCAB)
  (tmp_path / "other" / "000000.npz").replace(tmp_path / "one" / "000000.npz")
  with refused(UserError):
    validate_shard(tmp_path / "one", "000000", VOCAB)


@pytest.mark.parametrize("has_digests", [True, False])
@pytest.mark.parametrize("field", ["offsets", "lengths", "is_image", "groups", "concepts"])
def test_a_damaged_joined_array_is_found_and_named(tmp_path, field, has_digests):
  """Finds the array even in a store without digests, and then names the document."""
  folder = write_stage(tmp_path)
  if not has_digests:
    (tmp_path / "documents" / stages.DONE).unlink()
  assert validate_store(DocumentStore(folder, VOCAB))["documents"] == 7
  values = np.load(folder / f"{field}.npy")
  # An index of document 5 or of its segments.
  place = 5 if field in ("offsets", "groups", "concepts") else 10
  values[place] = not values[place] if field == "is_image" else values[place] + 1
  np.save(folder / f"{field}.npy", values)
  with refused(UserError):
    validate_store(DocumentStore(folder, VOCAB))


def test_a_whole_shard_of_other_documents_is_found(tmp_path):
  """The new shard has valid checksums and the same size, so only the digest reveals the change."""
  folder = write_stage(tmp_path)
  index = json.loads((folder / "index.json").read_text())
  other = [document(f"x{i}", text(*range(8, 9 + i)), image(301 + i)) for i in range(3)]
  write_shard(tmp_path / "other", "a", other, VOCAB)
  (tmp_path / "other" / "a.array_record").replace(folder / "a.array_record")
  assert (folder / "a.array_record").stat().st_size == index["files"]["a.array_record"]["bytes"]
  with refused(UserError):
    validate_store(DocumentStore(folder, VOCAB))


def prepare(folder, **fields) -> pathlib.Path:
  """Prepares one shard of noise images with crops; returns the raw folder."""
  if not (folder / "in").exists():  # New files would count as a changed source.
    (folder / "in").mkdir()
    for i in range(6):
      pixels = np.random.default_rng(i).integers(0, 256, (30, 30, 3), np.uint8)
      Image.fromarray(pixels).save(folder / "in" / f"{i}.png")
      (folder / "in" / f"{i}.txt").write_text(f"noise of number {i}")
  values = {"resolution": 16, "heldout_fraction": 0.3, "crops": 1, **fields}
  config = RawConfig(source=str(folder / "in"), **values)
  ingest.prepare(config, ingest.parts_of(config), folder / "raw", Runner())
  return folder / "raw"


def forget_digests(raw, name="000000"):
  """Removes the image digests of a shard, as if an earlier version wrote it."""
  (raw / name / reader.IMAGE_DIGESTS).unlink()
  record = read_json(raw / "done" / f"{name}.json")
  del record["summary"]["files"][reader.IMAGE_DIGESTS]
  write_json(raw / "done" / f"{name}.json", record)


@pytest.mark.parametrize("jpeg_quality", [0, 90])
def test_every_flipped_bit_of_a_raw_image_is_found(tmp_path, capsys, jpeg_quality):
  """Covers the images of added crops. Most flips give an image that can be decoded."""
  raw = prepare(tmp_path, jpeg_quality=jpeg_quality)
  validate_raw(raw, 2)
  images = sorted((raw / "000000" / "images").iterdir())
  assert len(images) > 6
  assert f"raw: 1 shards, {len(images)} images; all match their digests." in capsys.readouterr().out
  rng = np.random.default_rng(0)
  for path in images:
    content = path.read_bytes()
    flip(path, int(rng.integers(len(content))))
    with refused(UserError):
      validate_raw(raw, 2)
    path.write_bytes(content)
  validate_raw(raw, 2)


def test_raw_images_that_are_absent_or_swapped_are_found_and_made_again(tmp_path):
  raw = prepare(tmp_path)
  first, second = sorted((raw / "000000" / "images").iterdir())[:2]
  before = {path.name: path.read_bytes() for path in (first, second)}
  for change in (
    lambda: second.unlink(),
    lambda: second.write_bytes(before[first.name]),
    lambda: swap(first, second),
  ):
    change()
    with refused(UserError):
      validate_raw(raw, 2)
    shutil.rmtree(raw / "000000")  # Does what the message says: delete the shard.
    prepare(tmp_path)
    assert {path.name: path.read_bytes() for path in (first, second)} == before
    validate_raw(raw, 2)


def swap(first, second):
  one, other = first.read_bytes(), second.read_bytes()
  first.write_bytes(other)
  second.write_bytes(one)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: flip(path, 3)])
def test_digests_of_raw_images_have_a_digest(tmp_path, damage):
  raw = prepare(tmp_path)
  damage(raw / "000000" / reader.IMAGE_DIGESTS)
  with refused(UserError):
    validate_raw(raw, 2)


def test_a_raw_folder_of_an_earlier_version_is_read_and_validated_once(tmp_path, capsys):
  raw = prepare(tmp_path)
  pairs = reader.read_pairs(raw, "train")
  forget_digests(raw)
  validate_raw(raw, 2)
  sentence = "but 1 of the shards, from an earlier version, have no image digests"
  assert capsys.readouterr().out.count(sentence) == 1
  record = (raw / "done" / "000000.json").read_bytes()
  prepare(tmp_path)  # The same command does not rewrite the shard.
  assert (raw / "done" / "000000.json").read_bytes() == record
  assert reader.read_pairs(raw, "train") == pairs
