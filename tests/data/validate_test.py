"""Checks of document stores."""

import json

import numpy as np
import pytest

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import (
  DocumentStore,
  finish_store,
  write_documents,
  write_shard,
)
from cm3leon_jax.data.validate import validate_shard, validate_store
from tests.data.documents_test import VOCAB, document, flip, image, same, text, write_stage


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
  with pytest.raises(UserError, match=r"token_counts\.npy is not the sum of the token counts"):
    validate_store(DocumentStore(tmp_path, VOCAB))


@pytest.mark.parametrize(
  ("stage", "command"),
  [("documents", "encode_documents"), ("instructions", "encode_instructions")],
)
def test_the_command_that_writes_a_store_again_is_that_of_its_stage(tmp_path, stage, command):
  folder = tmp_path / stage / "train_a"
  write_documents(folder, [document("a", text(9, 10))], VOCAB)
  (folder / "000000.array_record").unlink()
  message = rf"record is missing: delete the folder .*/{stage} and run `cm3leon {command}`"
  with pytest.raises(UserError, match=message):
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
    else:  # The file's own signatures may be off: nobody reads them.
      store = DocumentStore(tmp_path, VOCAB)
      for i, original in enumerate(originals):
        same(original, store[i])
    flip(records, position)
  assert noticed > len(used[::13]) // 2


@pytest.mark.parametrize(
  ("others", "message"),
  [
    ([document("a", text(9), group="g")], "holds 2 documents, 000000.npz beside it 1"),
    (
      [document("a", text(9, 9), group="g"), document("b", text(9))],
      r"record 0 \('a'\) has other lengths",
    ),
    (
      [document("a", text(9), group="g"), document("b", image(300))],
      r"record 1 \('b'\) has other lengths",
    ),
    (
      [document("a", text(9), group="h"), document("b", text(9))],
      r"record 0 \('a'\) has another group",
    ),
    (
      [document("a", text(9), group="g", concept="c"), document("b", text(9))],
      r"record 0 \('a'\) has another concept",
    ),
    (
      [document("a", text(9), group="g"), document("b", text(10))],
      "has other token counts than 000000.npz says",
    ),
  ],
)
def test_lengths_of_other_documents_are_refused(tmp_path, others, message):
  write_documents(
    tmp_path / "one", [document("a", text(9), group="g"), document("b", text(9))], VOCAB
  )
  write_documents(tmp_path / "other", others, VOCAB)
  (tmp_path / "other" / "000000.npz").replace(tmp_path / "one" / "000000.npz")
  with pytest.raises(UserError, match=message):
    validate_shard(tmp_path / "one", "000000", VOCAB)


@pytest.mark.parametrize("has_digests", [True, False])
@pytest.mark.parametrize("field", ["offsets", "lengths", "is_image", "groups", "concepts"])
def test_a_damaged_joined_array_is_found_and_named(tmp_path, field, has_digests):
  """Also in a store without digests, where the document is named, too."""
  folder = write_stage(tmp_path)
  if not has_digests:
    (tmp_path / "documents" / stages.DONE).unlink()
  assert validate_store(DocumentStore(folder, VOCAB))["documents"] == 7
  values = np.load(folder / f"{field}.npy")
  place = 5 if field in ("offsets", "groups", "concepts") else 10  # Of document 5.
  values[place] = not values[place] if field == "is_image" else values[place] + 1
  np.save(folder / f"{field}.npy", values)
  message = (
    rf"{field}\.npy has another content"
    if has_digests
    else rf"{field}\.npy is wrong from document 5 on \(record 2 of b\)"
  )
  with pytest.raises(UserError, match=message):
    validate_store(DocumentStore(folder, VOCAB))


def test_a_whole_shard_of_other_documents_is_found(tmp_path):
  """It has right checksums and the same size, so that only its digest shows it."""
  folder = write_stage(tmp_path)
  index = json.loads((folder / "index.json").read_text())
  other = [document(f"x{i}", text(*range(8, 9 + i)), image(301 + i)) for i in range(3)]
  write_shard(tmp_path / "other", "a", other, VOCAB)
  (tmp_path / "other" / "a.array_record").replace(folder / "a.array_record")
  assert (folder / "a.array_record").stat().st_size == index["files"]["a.array_record"]["bytes"]
  with pytest.raises(UserError, match=r"a\.array_record has another content"):
    validate_store(DocumentStore(folder, VOCAB))
