import dataclasses
import hashlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.data.documents import store as documents_lib
from cm3leon_jax.data.documents.shard_files import BadRecord
from cm3leon_jax.data.documents.store import (
  Document,
  DocumentStore,
  Segment,
  finish_store,
  group_id,
  write_documents,
  write_shard,
)
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table
from cm3leon_jax.vocab import VocabLayout
from tests.data.stores import damage_record
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=300, image_size=16)


def text(*ids):
  return Segment(False, np.array(ids, np.int32))


def image(*ids):
  return Segment(True, np.array(ids, np.int32))


def document(key, *segments, group="", concept=""):
  return Document(key, segments, "somewhere", "CC0-1.0", "somebody", group, concept)


def same(a, b):
  assert dataclasses.replace(a, segments=()) == dataclasses.replace(b, segments=())
  assert [s.is_image for s in a.segments] == [s.is_image for s in b.segments]
  assert all(s.tokens.dtype == np.int32 for s in b.segments)
  assert [s.tokens.tolist() for s in a.segments] == [s.tokens.tolist() for s in b.segments]


texts = st.lists(st.integers(8, 299), min_size=1, max_size=20).map(lambda ids: text(*ids))
images = st.lists(st.integers(300, 315), min_size=1, max_size=20).map(lambda ids: image(*ids))
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
segments = st.lists(texts | images, min_size=1, max_size=5).map(tuple)
documents = st.builds(Document, words, segments, *[words] * 5)


@settings(max_examples=20)
@given(st.lists(documents, max_size=6))
def test_a_store_gives_back_what_was_written(tmp_path_factory, originals):
  folder = tmp_path_factory.mktemp("store")
  assert write_documents(folder, iter(originals), VOCAB) == len(originals)
  store = DocumentStore(folder, VOCAB)
  assert len(store) == len(originals)
  for i in reversed(range(len(originals))):
    same(originals[i], store[i])
    lengths, is_image = store.segment_lengths(i)
    assert lengths.tolist() == [len(s.tokens) for s in originals[i].segments]
    assert is_image.tolist() == [s.is_image for s in originals[i].segments]
    assert store.groups[i] == group_id(originals[i].group)
    assert store.concepts[i] == group_id(originals[i].concept)
  tokens = [int(token) for d in originals for s in d.segments for token in s.tokens]
  assert store.token_counts.tolist() == [tokens.count(token) for token in range(VOCAB.size)]


@pytest.mark.parametrize(
  "wrong",
  [
    document("x"),
    document("x", text()),
    document("x", text(9), image()),
    document("x", text(9, 1)),
    document("x", text(300)),
    document("x", image(299, 300)),
    document("x", image(316)),
  ],
)
def test_wrong_documents_are_refused_and_leave_no_store(tmp_path, wrong):
  write_documents(tmp_path, [document("a", text(9))], VOCAB)
  with refused(UserError, "document 'x'"):
    write_documents(tmp_path, [document("a", text(9)), wrong], VOCAB)
  with refused(UserError, "index.json"):
    DocumentStore(tmp_path, VOCAB)


def test_another_vocabulary_or_version_is_refused(tmp_path):
  write_documents(tmp_path, [document("a", text(9))], VOCAB)
  with refused(UserError, "vocabulary", "17"):
    DocumentStore(tmp_path, VocabLayout(num_special=8, text_size=300, image_size=17))
  index = json.loads((tmp_path / "index.json").read_text())
  (tmp_path / "index.json").write_text(json.dumps({**index, "schema_version": 99}))
  with refused(UserError, "version 99"):
    DocumentStore(tmp_path, VOCAB)


def test_shards_are_one_store(tmp_path, monkeypatch):
  monkeypatch.setattr(documents_lib, "MAX_OPEN", 1)
  originals = [document(f"d{i}", text(8 + i), image(300 + i), group=f"g{i % 2}") for i in range(7)]
  for name, part in {"b": originals[2:3], "a": originals[:2], "d": originals[3:], "c": []}.items():
    assert write_shard(tmp_path, name, part, VOCAB) == len(part)
  assert finish_store(tmp_path, ["a", "b", "c", "d"], VOCAB) == 7
  store = DocumentStore(tmp_path, VOCAB)
  assert store.shards == {"a": 2, "b": 1, "c": 0, "d": 4}
  for i in (6, 0, 2, 3, 1, 5, 4):
    same(originals[i], store[i])
    assert store.segment_lengths(i)[0].tolist() == [1, 1]
  assert store.groups.tolist() == [group_id(f"g{i % 2}") for i in range(7)]
  assert np.flatnonzero(store.token_counts).tolist() == [*range(8, 15), *range(300, 307)]
  assert finish_store(tmp_path, ["d", "a"], VOCAB) == 6
  same(originals[0], DocumentStore(tmp_path, VOCAB)[4])
  with refused(UserError, "e.npz"):
    finish_store(tmp_path, ["a", "e"], VOCAB)


def test_the_bank_is_training_pairs_and_then_those_of_its_split(tmp_path):
  made = [document(f"d{i}", text(*range(8, 9 + i)), image(300)) for i in range(5)]
  write_documents(tmp_path / "train_pairs", made[:3], VOCAB)
  for number in (3, 5):
    bank = documents_lib.Bank(tmp_path, VOCAB)
    assert len(bank) == number
    for i in range(number):
      same(bank[i], made[i])
      assert bank.segment_lengths(i)[0].tolist() == [i + 1, 1]
    for i in (-1, number):
      with refused(IndexError, str(i)):
        bank[i]
    assert bank.token_counts.sum() == 1 + 2 + 3 + 3
    write_documents(tmp_path / "bank_pairs", made[3:], VOCAB)


def test_group_ids():
  assert group_id("") == 0
  assert group_id("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big") != group_id("b")


def flip(path, position, bit=0):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  path.write_bytes(bytes(data))


def write_stage(root, number=7):
  """Writes a finished stage `documents` with two shards; returns the folder of the store."""
  made = [document(f"d{i}", text(*range(8, 9 + i)), image(300 + i)) for i in range(number)]
  folder = root / "documents"
  with stages.once(folder, {}, files=table.STAGES["documents"].files):
    for name, part in {"a": made[:3], "b": made[3:]}.items():
      write_shard(folder / "train_pairs", name, part, VOCAB)
    finish_store(folder / "train_pairs", ["a", "b"], VOCAB)
  return folder / "train_pairs"


@pytest.mark.parametrize("field", ["offsets", "lengths", "is_image", "groups", "concepts"])
def test_a_flipped_bit_of_an_array_is_refused_when_it_is_opened(tmp_path, field):
  folder = write_stage(tmp_path)
  opened = DocumentStore(folder, VOCAB)
  assert len(getattr(opened, field))
  flip(folder / f"{field}.npy", 140)
  with refused(UserError, f"{field}.npy"):
    getattr(DocumentStore(folder, VOCAB), field)


def test_arrays_that_do_not_fit_are_refused_without_digests(tmp_path):
  folder = write_stage(tmp_path)
  (tmp_path / "documents" / stages.DONE).unlink()
  lengths = np.load(folder / "lengths.npy")
  np.save(folder / "lengths.npy", lengths[:-1])
  with refused(UserError, "index.json"):
    DocumentStore(folder, VOCAB)
  (folder / "lengths.npy").write_bytes(b"\x93NUMPY")
  with refused(UserError, "lengths.npy"):
    DocumentStore(folder, VOCAB)


def test_a_document_that_cannot_be_read_is_named(tmp_path):
  folder = write_stage(tmp_path)
  records = folder / "b.array_record"
  whole = records.read_bytes()
  damage_record(records, 2)
  store = DocumentStore(folder, VOCAB)
  with refused(BadRecord, "b.array_record", "document 5"):
    store[5]
  same(store[4], document("d4", text(*range(8, 13)), image(304)))
  records.write_bytes(whole[:-1])
  with pytest.raises(BadRecord, match=rf"b\.array_record has .* bytes instead of {len(whole):,}"):
    DocumentStore(folder, VOCAB)[4]
  records.unlink()
  with refused(BadRecord, "b.array_record"):
    DocumentStore(folder, VOCAB)[4]
  same(DocumentStore(folder, VOCAB)[0], document("d0", text(8), image(300)))


def test_a_record_of_other_lengths_is_named(tmp_path):
  """In a store without digests, the lengths reveal a shard with other documents."""
  folder = write_stage(tmp_path)
  index = json.loads((folder / "index.json").read_text())
  del index["files"]
  (folder / "index.json").write_text(json.dumps(index))
  (tmp_path / "documents" / stages.DONE).unlink()
  (folder / "a.array_record").write_bytes((folder / "b.array_record").read_bytes())
  with refused(BadRecord, "a.array_record", "lengths.npy"):
    DocumentStore(folder, VOCAB)[1]


def test_a_shard_of_another_size_joins_no_store(tmp_path):
  folder = write_stage(tmp_path)
  with (folder / "a.array_record").open("ab") as file:
    file.write(b"0")
  with pytest.raises(UserError, match=r"a\.array_record has .* bytes instead of"):
    finish_store(folder, ["a", "b"], VOCAB)
