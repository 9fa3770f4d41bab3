"""The command from a finished workdir to a page, and its mistakes in one sentence."""

import os
import pathlib
import subprocess
import sys

from absl import flags
from etils import epath
import jax
import pytest

from cm3leon_jax import stages
from cm3leon_jax.commands import inspect_data
from cm3leon_jax.config import UserError
from cm3leon_jax.tokenizers import text, vqgan
from tests.data.stores import VOCAB
from tests.launch import train_test
from tests.reports.inspect_page_test import VQGAN

ROOT = pathlib.Path(__file__).parents[2]
stores = train_test.workdir  # Documents and neighbors, as the stages before training leave them.


@pytest.fixture
def workdir(stores):
  texts = [f"a red cat and dog word{i}" for i in range(300)] * 3
  for folder in ("text_tokenizer", "vqgan"):
    with stages.once(stores / folder, {}):
      pass
  text.train_text_tokenizer(texts, VOCAB, text.TextTokenizerConfig(), stores / "text_tokenizer")
  params = vqgan.init_params(VQGAN, VOCAB.image_size, jax.random.key(0))
  vqgan.ImageTokenizer(VQGAN, VOCAB.image_size, params).save(stores / "vqgan")
  return stores


def draw(workdir, out, split="train", numbers=range(1)):
  inspect_data.draw(
    train_test.settings_with(), workdir, epath.Path(out), split, numbers, "ml_configs/mine.py"
  )


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_of_both_splits_become_a_page(workdir, capsys, split):
  out = workdir / "pages" / "rows.html"
  draw(workdir, out, split, range(2, 8))
  html = out.read_text(encoding="utf-8")
  assert "Rows 2 to 7" in html
  assert "ml_configs/mine.py" in html
  assert ('class="box infill' in html) == (split == "train")  # No spans are held out.
  assert capsys.readouterr().out.startswith("inspect_data: 6 rows, ")
  assert [path.name for path in out.parent.iterdir()] == ["rows.html"]


@pytest.mark.parametrize("folder", inspect_data.READ)
def test_a_stage_that_is_missing_is_told(workdir, folder):
  (workdir / folder / stages.DONE).unlink()
  command = stages.STAGES[folder].command
  with pytest.raises(
    UserError, match=rf"{folder} is not finished: run `python -m launch\.{command}`"
  ):
    draw(workdir, workdir / "rows.html")
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
  command = [
    sys.executable,
    "-m",
    "launch.inspect_data",
    "--config=ml_configs/openmoji.py",
    f"--workdir={tmp_path}",
    out,
  ]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ, check=False
  )
  assert result.returncode == 2
  assert result.stderr == (
    "error: --out is /dev/null/rows.html, which cannot be written (File exists: /dev/null): name a file in a folder of yours.\n"
  )
