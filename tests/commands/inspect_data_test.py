import pathlib
import re

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.clip.model import normalize
from cm3leon_jax.commands import inspect_data
from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages, table
from cm3leon_jax.stages.shards import Runner
from cm3leon_jax.tokenizers import text, vqgan
from tests.data.stores import VOCAB
from tests.launch import tiny_instruct_config
from tests.launch.stages_before import make_workdir
from tests.models.tiny import random_arrays
from tests.refusals import refused
from tests.retrieval.stores import write_bank
from tests.run import rows_test
from tests.tokenizers.tiny import tiny_config

VQGAN = tiny_config(downsample=2, stem=2)
stores = rows_test.workdir  # Fixture that makes document stores with neighbors for training.


@pytest.fixture
def workdir(stores):
  texts = [f"a red cat and dog word{i}" for i in range(300)] * 3
  for folder in ("text_tokenizer", "vqgan"):
    with stages.once(stores / folder, {}):
      pass
  text.train_text_tokenizer(texts, VOCAB, TextTokenizerConfig(), stores / "text_tokenizer")
  types = jax.eval_shape(lambda: vqgan.init_params(VQGAN, VOCAB.image_size, jax.random.key(0)))
  params = random_arrays(types)
  vqgan.ImageTokenizer(VQGAN, VOCAB.image_size, params).save(stores / "vqgan")
  return stores


def show_rows(workdir, out, split="train", numbers=range(1)):
  inspect_data.show_rows(rows_test.settings_with(), workdir, epath.Path(out), split, numbers)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_of_both_splits_are_shown(workdir, capsys, split):
  out = workdir / "sheets" / "rows.png"
  show_rows(workdir, out, split, range(2, 8))
  printed = capsys.readouterr().out
  assert re.findall(r"^row (\d+): ", printed, re.MULTILINE) == [*"234567"]
  assert ("infill: <mask:0>" in printed) == (split == "train")  # Only training rows have spans.
  with Image.open(out) as sheet:
    assert sheet.height == 6 * VQGAN.resolution
  assert [path.name for path in out.parent.iterdir()] == ["rows.png"]


def test_rows_of_instructions_are_shown(tmp_path, capsys):
  """A run that has only instructions has no folder documents/."""
  config = tiny_instruct_config.get_config()
  config.instructions.replay_share = 0.0
  settings, workdir = settings_from_config(config), epath.Path(tmp_path)
  make_workdir(tmp_path, settings)
  for name in table.TOKENIZERS:
    write_json(workdir / name / stages.DONE, {"id": name, "config": {}, "summary": {}})
  for name in inspect_data.DOCUMENTS:
    (workdir / name).rmtree()
  out = workdir / "rows.png"
  inspect_data.show_rows(settings, workdir, out, "train", range(6))
  assert "targets of weight 1" in capsys.readouterr().out
  assert out.exists()


@pytest.fixture
def finished(workdir):
  count, rng = 50, np.random.default_rng(0)
  texts, images = (normalize(rng.normal(size=(count, 8)).astype(np.float32)) for _ in range(2))
  names = [str(i) for i in range(count)]
  for split in ("train", "heldout"):
    write_bank(workdir / "neighbors" / split, texts, images, names, names)
    write_json(workdir / "neighbors" / split / "rows.json", {"first_bank": count})
  for name in inspect_data.READ:
    (workdir / name / stages.DONE).unlink()
    with stages.once(workdir / name, {}, files=table.STAGES[name].files):
      pass
  return workdir


def change_array(path, place):
  values = np.load(path)
  values[place] += 1
  np.save(path, values)


def test_a_whole_run_is_valid(finished, capsys):
  inspect_data.validate(rows_test.settings_with(), finished)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("text_tokenizer: 3 files as written.")
  assert sum(line.endswith("all shards match their digests.") for line in lines) >= 4
  assert lines[-1].endswith("raw: is missing or not finished, so its images were not checked.")
  (finished / "vqgan" / stages.DONE).unlink()
  with refused(UserError, "vqgan"):
    inspect_data.validate(rows_test.settings_with(), finished)


def test_a_changed_image_of_raw_is_found(finished, tmp_path, capsys):
  (tmp_path / "in").mkdir()
  for i in range(4):
    Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / f"{i}.txt").write_text(f"shade {i}")
  config = RawConfig(source=str(tmp_path / "in"), resolution=8)
  ingest.prepare(config, ingest.parts_of(config), finished / "raw", Runner())
  write_json(finished / "raw" / stages.DONE, {"id": "r", "config": {}, "summary": {}})
  inspect_data.validate(rows_test.settings_with(), finished)
  assert capsys.readouterr().out.endswith("raw: 1 shards, 4 images; all match their digests.\n")
  image = pathlib.Path(finished) / "raw/000000/images/0000002.png"
  Image.new("RGB", (8, 8)).save(image)
  with refused(UserError, image.name):
    inspect_data.validate(rows_test.settings_with(), finished)


@pytest.mark.parametrize(
  ("damage", "file"),
  [
    (lambda at: change_array(at / "documents/train_pairs/lengths.npy", 20), "lengths.npy"),
    (lambda at: next((at / "neighbors/train/images").rglob("c/*/*")).unlink(), "train/images"),
    (lambda at: (at / "neighbors/train_pairs/scores/index.json").write_text("{}"), "scores"),
    (lambda at: (at / "text_tokenizer/tokenizer.json").unlink(), "tokenizer.json"),
  ],
)
def test_damage_is_found_with_its_file(finished, damage, file):
  damage(pathlib.Path(finished))
  with refused(UserError, file):
    inspect_data.validate(rows_test.settings_with(), finished)


@pytest.mark.parametrize("folder", inspect_data.READ)
def test_a_missing_stage_is_reported(workdir, folder):
  (workdir / folder / stages.DONE).unlink()
  with refused(UserError, folder):
    show_rows(workdir, workdir / "rows.png")
  assert not (workdir / "rows.png").exists()
