import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.retrieval import arrays
from cm3leon_jax.retrieval.arrays import ArrayStore
from tests.refusals import refused


@pytest.fixture
def rows():
  return np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def test_appended_rows_are_read_back(tmp_path, rows, monkeypatch):
  # The appends below cross the boundaries of 7-row reads and of 14-row files.
  monkeypatch.setattr(arrays, "READ_BYTES", 7 * 6 * 2)
  monkeypatch.setattr(arrays, "FILE_BYTES", 14 * 6 * 2)
  store = ArrayStore.create(tmp_path / "a", (6,), np.float16)
  assert store[:].shape == (0, 6)
  for start, end in ((0, 10), (10, 10), (10, 33), (33, 50)):
    store.append(rows[start:end])
    assert len(store) == end
  for opened in (store, ArrayStore(tmp_path / "a")):
    assert (opened.shape, opened.dtype) == ((50, 6), np.float16)
    np.testing.assert_array_equal(opened[:], rows.astype(np.float16))
    np.testing.assert_array_equal(opened[5:40], rows[5:40].astype(np.float16))
    np.testing.assert_array_equal(
      opened[np.array([49, 0, 7, 7])], rows[[49, 0, 7, 7]].astype(np.float16)
    )
  files = [p for p in (tmp_path / "a" / "c").rglob("*") if p.is_file()]
  assert len(files) == 4  # 50 rows in files of 14 rows.


def test_an_append_that_was_killed_is_not_read_and_can_be_made_again(tmp_path, rows, monkeypatch):
  store = ArrayStore.create(tmp_path / "a", (6,), np.float32)
  store.append(rows[:20])

  def kill(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(arrays, "write_json", kill)
    with pytest.raises(KeyboardInterrupt):
      store.append(rows[40:])
  opened = ArrayStore(tmp_path / "a")
  np.testing.assert_array_equal(opened[:], rows[:20])
  opened.append(rows[20:30])
  np.testing.assert_array_equal(ArrayStore(tmp_path / "a")[:], rows[:30])


def test_preparing_keeps_what_fits(tmp_path, rows):
  ArrayStore.create(tmp_path / "a", (6,), np.float32).append(rows[:30])
  assert ArrayStore.prepare(tmp_path / "a", (6,), np.float32, 50)
  store = ArrayStore(tmp_path / "a")
  store.write(30, rows[30:])
  store.commit()
  np.testing.assert_array_equal(store[:], rows)
  # With another dtype, the stored rows are discarded.
  assert not ArrayStore.prepare(tmp_path / "a", (6,), np.float16, 50)
  store = ArrayStore(tmp_path / "a")
  store.commit()
  assert store.dtype == np.float16
  with refused(UserError, str(tmp_path / "a")):
    store[:]  # No row was written.


def files_of(path):
  return sorted(p for p in (path / "c").rglob("*") if p.is_file())


@pytest.fixture
def small_files(monkeypatch):
  monkeypatch.setattr(arrays, "READ_BYTES", 4 * 16)
  monkeypatch.setattr(arrays, "FILE_BYTES", 8 * 16)


def write_ids(path, ids):
  ArrayStore.prepare(path, (4,), np.int32, len(ids))
  store = ArrayStore(path)
  store.write(0, ids)
  store.commit(digest=True)
  return ArrayStore(path)


def test_zeros_are_rows_and_a_lost_file_is_an_error(tmp_path, small_files):
  """Without a check, the rows of a lost file would be zeros, and every neighbor document 0."""
  path, zeros = tmp_path / "neighbors" / "train_pairs" / "ids", np.zeros((20, 4), np.int32)
  store = write_ids(path, zeros)
  np.testing.assert_array_equal(store.read_all(), zeros)
  assert len(files_of(path)) == 3
  files_of(path)[1].unlink()
  store = ArrayStore(path)
  for read in (store.read_all, lambda: store[:], lambda: store[np.array([0, 9])]):
    with refused(UserError, str(path)):
      read()
  np.testing.assert_array_equal(store[:8], zeros[:8])
  with refused(UserError, str(path)):
    store.commit(digest=True)


def flips(path, every):
  """Flips every `every`-th bit of a file alone, and lastly writes the file as it was."""
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), every):
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    yield
  path.write_bytes(whole)


def test_every_flipped_bit_of_a_file_is_an_error(tmp_path, small_files):
  ids = np.random.default_rng(0).integers(0, 50, (20, 4)).astype(np.int32)
  write_ids(tmp_path / "a", ids)
  for path in files_of(tmp_path / "a"):
    for _ in flips(path, 97):
      with refused(UserError, str(tmp_path / "a")):
        ArrayStore(tmp_path / "a")[:]
  np.testing.assert_array_equal(ArrayStore(tmp_path / "a").read_all(), ids)


def test_every_flipped_bit_of_the_metadata_is_an_error_or_harmless(tmp_path, small_files):
  """Only a count of rows that is too large is harmless, because a killed writer also leaves one."""
  ids, harmless = np.random.default_rng(0).integers(0, 50, (20, 4)).astype(np.int32), 0
  write_ids(tmp_path / "a", ids)
  for _ in flips(tmp_path / "a" / arrays.METADATA, 7):
    try:
      found = ArrayStore(tmp_path / "a")[:]
    except UserError:
      continue
    np.testing.assert_array_equal(found, ids)
    harmless += 1
  assert harmless < 8


def test_rows_of_another_array_are_an_error(tmp_path, small_files):
  """An intact file in the wrong place has valid checksums."""
  ids = np.arange(80, dtype=np.int32).reshape(20, 4)
  write_ids(tmp_path / "a", ids)
  first, second, _ = files_of(tmp_path / "a")
  second.write_bytes(first.read_bytes())
  store = ArrayStore(tmp_path / "a")
  np.testing.assert_array_equal(store[8:16], ids[:8])
  with refused(UserError, str(tmp_path / "a")):
    store.read_all()
