import dataclasses

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.raw import counting, ingest, reader
from cm3leon_jax.data.sources import formats
from cm3leon_jax.stages.from_data import Counts
from cm3leon_jax.stages.shards import Runner


def folder_of(path, sides, texts=0):
  path.mkdir()
  for i, (width, height) in enumerate(sides):
    pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path / f"{i}.png")
    (path / f"{i}.txt").write_text(f"image {i % 3} of noise")
  for i in range(texts):
    (path / f"text{i}.txt").write_text("noise has no meaning " * 3)
  return path


@pytest.mark.parametrize(
  ("sides", "side"),
  [
    ([(256, 256)] * 3, 48),
    ([(47, 200)] * 3, 24),
    ([(32, 32)] * 2 + [(640, 480)], 24),
    ([(32, 32)] + [(640, 480)] * 2, 48),
  ],
)
def test_the_resolution_is_one_that_most_images_reach(tmp_path, sides, side):
  source = folder_of(tmp_path / "source", sides)
  assert counting.resolution_of(formats.parts(str(source))) == side


def test_records_characters_and_tokens_are_counted(tmp_path):
  source = folder_of(tmp_path / "source", [(40, 40)] * 12, texts=5)
  config = RawConfig(source=str(source), resolution=32, heldout_fraction=0.0)
  folder = tmp_path / "raw"
  runner = Runner("local", "", 1, 1.0)
  summary = ingest.prepare(config, ingest.parts_of(config), folder, runner)
  made = counting.counts_of(folder, summary, 32, 32, TextTokenizerConfig())
  captions = sum(len(f"image {i % 3} of noise") for i in range(12))
  texts = 5 * len(("noise has no meaning " * 3).strip())
  tokens = made.text_tokens
  assert made == Counts(32, 12, 5, 0, captions, made.text_characters, tokens)
  # White space at the ends of texts may count or not.
  assert abs(made.text_characters - texts) <= 5
  # 32 special ids, 256 bytes, and some merges: " image", " of", " noise", " has", " no", ...
  assert 32 + 256 < tokens < 32 + 256 + 60


@pytest.mark.parametrize(("images", "crops"), [(0, 0), (2, 9), (12, 7), (40, 1), (51, 0), (200, 0)])
def test_few_images_get_many_crops(tmp_path, monkeypatch, images, crops):
  monkeypatch.setattr(counting, "PAIRS", 100)
  monkeypatch.setattr(counting, "CHOSEN_CROPS", 9)
  source = folder_of(tmp_path / "source", [(8, 8)] * images, texts=3)
  assert counting.crops_of(formats.parts(str(source))) == crops


def test_captions_of_crops_do_not_count(tmp_path):
  """Repeated captions of crops would make tokens of words that occur in only one caption."""
  source = folder_of(tmp_path / "source", [(40, 40)] * 12)
  folder, runner = tmp_path / "raw", Runner("local", "", 1, 1.0)
  config = RawConfig(source=str(source), resolution=32, heldout_fraction=0.0)
  captions = []
  for crops in (0, 3):
    made = dataclasses.replace(config, crops=crops)
    summary = ingest.prepare(made, ingest.parts_of(made), folder, runner)
    assert summary["train_pairs"] == 12 * (1 + crops)
    captions.append(reader.read_captions(folder))
  assert captions[0] == captions[1]
  assert len(captions[0]) == 12
