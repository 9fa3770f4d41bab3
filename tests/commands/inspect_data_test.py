import pathlib

from absl import flags
from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.clip.model import normalize
from cm3leon_jax.commands import inspect_data
from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.files.shards import Runner
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.tokenizers import text, vqgan
from cm3leon_jax.tokenizers.config import TextTokenizerConfig
from tests.data.stores import VOCAB
from tests.launch import tiny_instruct_config
from tests.launch.stages_before import make_workdir
from tests.launched import launch
from tests.refusals import check_refused, refused
from tests.reports.inspect_page_test import VQGAN
from tests.retrieval.stores import write_bank, write_neighbors
from tests.trained import rows_test

ROOT = pathlib.Path(__file__).parents[2]
stores = rows_test.workdir  # Fixture that makes document stores with neighbors for training.


@pytest.fixture
def workdir(stores):
  texts = [f"a red cat and dog word{i}" for i in range(300)] * 3
  for folder in ("text_tokenizer", "vqgan"):
    with stages.once(stores / folder, {}):
      pass
  text.train_text_tokenizer(texts, VOCAB, TextTokenizerConfig(), stores / "text_tokenizer")
  params = vqgan.init_params(VQGAN, VOCAB.image_size, jax.random.key(0))
  vqgan.ImageTokenizer(VQGAN, VOCAB.image_size, params).save(stores / "vqgan")
  return stores


def write_page(workdir, out, split="train", numbers=range(1)):
  settings, out = rows_test.settings_with(), epath.Path(out)
  inspect_data.write_page(settings, workdir, out, split, numbers, "ml_configs/mine.py")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_page_shows_rows_of_both_splits(workdir, capsys, split):
  out = workdir / "pages" / "rows.html"
  write_page(workdir, out, split, range(2, 8))
  html = out.read_text(encoding="utf-8")
  assert "Rows 2 to 7" in html
  assert "ml_configs/mine.py" in html
  assert ('class="box infill' in html) == (split == "train")  # Only training rows have spans.
  assert capsys.readouterr().out.startswith("inspect_data: 6 rows, ")
  assert [path.name for path in out.parent.iterdir()] == ["rows.html"]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("replay_share", [0.0, 0.4])
def test_the_page_shows_rows_of_instructions(tmp_path, capsys, split, replay_share):
  """A run that has only instructions has no folder documents/."""
  config = tiny_instruct_config.get_config()
  config.instructions.replay_share = replay_share
  settings, workdir = settings_from_config(config), epath.Path(tmp_path)
  make_workdir(tmp_path, settings)
  for name in table.TOKENIZERS:
    write_json(workdir / name / stages.DONE, {"id": name, "config": {}, "summary": {}})
  if not replay_share:
    for name in inspect_data.DOCUMENTS:
      (workdir / name).rmtree()
  out = workdir / "rows.html"
  inspect_data.write_page(settings, workdir, out, split, range(6), "c.py")
  html = out.read_text(encoding="utf-8")
  assert html.count("<span>task <b>") == html.count('<figure class="target">') > 0
  assert ("<dt>neighbors per document</dt>" in html) == (replay_share > 0)
  assert (html.count("<article") > html.count("<span>task <b>")) == (replay_share > 0)
  assert capsys.readouterr().out.startswith("inspect_data: 6 rows, ")
  (workdir / "instructions" / stages.DONE).unlink()
  with refused(UserError):
    inspect_data.write_page(settings, workdir, out, split, range(6), "c.py")


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


def write_wrong_neighbors(root):
  write_json(root / "neighbors" / stages.DONE, {"id": "n", "config": {}, "summary": {}})
  ids = np.full((50, 4), 50, np.int32)
  write_neighbors(root / "neighbors" / "heldout_pairs", text_ids=ids)


def test_a_whole_run_is_valid(finished, capsys):
  inspect_data.validate(rows_test.settings_with(), finished)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("text_tokenizer: 3 files as written.")
  assert sum(line.endswith("all valid.") for line in lines) == 5
  assert "neighbors: 50 documents, 16 arrays, " in lines[-2]
  assert lines[-1].endswith("raw: is missing or not finished, so its images were not checked.")
  (finished / "vqgan" / stages.DONE).unlink()
  with refused(UserError):
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
  with refused(UserError):
    inspect_data.validate(rows_test.settings_with(), finished)


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize(
  ("damage", "needs_digests"),
  [
    (lambda at: change_array(at / "documents/train_pairs/lengths.npy", 20), False),
    (lambda at: change_array(at / "documents/heldout_texts/groups.npy", 3), False),
    (lambda at: next((at / "neighbors/train/images").rglob("c/*/*")).unlink(), False),
    (write_wrong_neighbors, False),
    (lambda at: (at / "neighbors/train_pairs/scores/index.json").write_text("{}"), False),
    (lambda at: (at / "text_tokenizer/tokenizer.json").unlink(), True),
  ],
)
def test_damage_is_found_with_file_and_record(finished, damage, needs_digests, is_legacy):
  if is_legacy:
    for name in inspect_data.READ:
      write_json(finished / name / stages.DONE, {"id": name, "config": {}, "summary": {}})
  damage(pathlib.Path(finished))
  if is_legacy and needs_digests:
    return
  with refused(UserError):
    inspect_data.validate(rows_test.settings_with(), finished)


@pytest.mark.parametrize("folder", inspect_data.READ)
def test_a_missing_stage_is_reported(workdir, folder):
  (workdir / folder / stages.DONE).unlink()
  with refused(UserError):
    write_page(workdir, workdir / "rows.html")
  assert not (workdir / "rows.html").exists()


@pytest.mark.parametrize(
  ("name", "value", "sentence"),
  [
    ("first_row", "-1", "-1 is not a non-negative integer"),
    ("rows", "0", "0 is not a positive integer"),
    ("split", "test", r"value should be one of <train\|heldout>"),
  ],
)
def test_rows_that_do_not_exist_are_refused(name, value, sentence):
  with pytest.raises(flags.IllegalFlagValueError, match=sentence):
    flags.FLAGS[name].parse(value)


def test_a_mistake_ends_in_one_sentence(tmp_path):
  out = "--out=/dev/null/rows.html"
  config = "--config=ml_configs/scenes.py"
  check_refused(launch("inspect_data", config, f"--workdir={tmp_path}", out))
