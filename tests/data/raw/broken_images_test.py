"""Tests that the message about a broken image is the same in each run and in all readers."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources.records import RecordError, Rejected
from cm3leon_jax.generation import given_images
from tests.data.raw.untrusted_test import FORMATS, encoded
from tests.data.sources.formats_test import prepare, write_tar
from tests.refusals import refused

ADDRESS = re.compile("0x[0-9a-fA-F]{6,}")


class FromLibrary(OSError):
  """Error whose text contains a memory address, as in some errors of PIL."""

  def __str__(self):
    return f"cannot identify image file {self.args[0]!r} <bound method f of {object()!r}>"


def sources_of(folder, data: bytes) -> list:
  """Writes a captioned image as a source of each kind; returns the sources."""
  pairs = [("x.jpg", data), ("x.txt", b"a red heart")]
  beside = folder / "beside"
  beside.mkdir()
  for name, content in pairs:
    (beside / name).write_bytes(content)
  line = '{"image": "x.jpg", "caption": "a red heart"}\n'
  lists = {"metadata.jsonl": line, "metadata.csv": "image,caption\nx.jpg,a red heart\n"}
  for name, content in lists.items():
    listed = folder / f"by_{name}"
    listed.mkdir()
    (listed / "x.jpg").write_bytes(data)
    (listed / name).write_text(content)
  write_tar(folder / "x.tar", pairs)
  table = pyarrow.table({"image": [data], "caption": ["a red heart"]})
  pyarrow.parquet.write_table(table, folder / "x.parquet")
  listed = [folder / f"by_{name}" for name in lists]
  return [beside, *listed, folder / "x.tar", folder / "x.parquet"]


def test_no_reader_prints_the_address_of_an_object(tmp_path, monkeypatch):
  def fails(file, *args):
    raise FromLibrary(file)

  monkeypatch.setattr(reader, "_decode", fails)
  for number, source in enumerate(sources_of(tmp_path, encoded("png"))):
    raw = tmp_path / f"{number}"
    with pytest.raises(UserError) as error:
      prepare(raw, source=str(source))
    found = (raw / ingest.REJECTED).read_text() + str(error.value)
    assert "cannot identify image file <" in found
    assert not ADDRESS.search(found), found
  with refused(UserError) as error:
    given_images.load_image(str(tmp_path / "beside" / "x.jpg"), 8)
  assert not ADDRESS.search(str(error.value))


def test_no_rejected_record_has_the_address_of_an_object():
  for error in (FromLibrary(object()), RecordError(f"{FromLibrary(object())}")):
    line = json.dumps(vars(Rejected("file", "key", "wrong", f"it cannot be read ({error}).")))
    assert "<object object>" in line
    assert not ADDRESS.search(line)


@given(st.binary(max_size=60), st.sampled_from(FORMATS), st.data())
@settings(max_examples=300, deadline=None)
def test_the_same_broken_image_is_refused_in_the_same_words(data, kind, draw):
  content = encoded(kind)
  at = draw.draw(st.integers(0, len(content)))
  broken, sentences = content[:at] + data + content[at + draw.draw(st.integers(0, 60)) :], []
  for _ in range(2):
    try:
      reader.load_image(broken, 8)
    except UserError as error:
      sentences.append(str(error))
  assert sentences[:1] == sentences[1:]
  assert not any(map(ADDRESS.search, sentences))
