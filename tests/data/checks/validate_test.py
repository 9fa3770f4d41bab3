import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.checks.validate import validate_raw, validate_stores
from cm3leon_jax.data.documents.store import (
  write_shard,
)
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.data.documents.store_test import VOCAB, document, flip, image, text, write_stage
from tests.refusals import refused


def test_a_whole_shard_of_other_documents_is_found(tmp_path):
  """The new shard has valid checksums and the same size, so only the digest reveals the change."""
  folder = write_stage(tmp_path)
  validate_stores(tmp_path / "documents", VOCAB)
  index = json.loads((folder / "index.json").read_text())
  other = [document(f"x{i}", text(*range(8, 9 + i)), image(301 + i)) for i in range(3)]
  write_shard(tmp_path / "other", "a", other, VOCAB)
  (tmp_path / "other" / "a.array_record").replace(folder / "a.array_record")
  assert (folder / "a.array_record").stat().st_size == index["files"]["a.array_record"]["bytes"]
  with refused(UserError, "a.array_record"):
    validate_stores(tmp_path / "documents", VOCAB)


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
    with refused(UserError, "images/"):
      validate_raw(raw, 2)
    path.write_bytes(content)
  validate_raw(raw, 2)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: flip(path, 3)])
def test_digests_of_raw_images_have_a_digest(tmp_path, damage):
  raw = prepare(tmp_path)
  damage(raw / "000000" / reader.IMAGE_DIGESTS)
  with refused(UserError, reader.IMAGE_DIGESTS):
    validate_raw(raw, 2)
