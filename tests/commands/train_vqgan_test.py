import dataclasses
import shutil
from unittest import mock

import numpy as np
import pytest

from cm3leon_jax.commands import train_vqgan as command
from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import stages, table
from cm3leon_jax.stages.shards import Runner
from cm3leon_jax.training.image_models import vqgan_training
from tests.data.raw_folder import write_raw
from tests.generation.run import make_config
from tests.tokenizers.vqgan_test import LOCAL


@dataclasses.dataclass(frozen=True)
class Half:
  """Fake tokenizer whose reconstructions of even images are blank and of odd images perfect."""

  config: VQGANConfig

  def encode(self, images):
    return images

  def decode(self, codes):
    return np.where(np.arange(len(codes))[:, None, None, None] % 2, codes, np.uint8(255))


JUDGE = """
def blank(image, facts):
  assert facts == {"n": 1}
  return "blank" if (image == 255).all() else ""
"""


def test_reconstructions_are_judged_by_the_function_of_the_config(tmp_path):
  colors = np.arange(24, dtype=np.uint8)[:, None, None, None]
  images = np.broadcast_to(colors, (24, 8, 8, 3))
  pairs = [{"key": f"k{i}", "caption": "a", "split": "heldout", "facts": {"n": 1}}
           for i in range(24)]  # fmt: skip
  write_raw(tmp_path / "raw", pairs, images)
  (tmp_path / "own.py").write_text(JUDGE)
  config = make_config()
  config.evaluation.judge = f"{tmp_path}/own.py:blank"
  tokenizer = Half(dataclasses.replace(LOCAL, resolution=8))
  assert command._judge(settings_from_config(config), tmp_path, tokenizer) == {
    "real_images_right": 1.0,
    "reconstructed_images_right": 0.5,
  }
  assert command._judge(settings_from_config(make_config()), tmp_path, tokenizer) == {}


def test_pairs_without_facts_are_not_judged(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "texts.jsonl").write_text('{"key": "a", "text": "b", "split": "train"}\n')
  raw = RawConfig(source=str(tmp_path / "in"))
  ingest.prepare(raw, ingest.parts_of(raw), tmp_path / "raw", Runner())
  assert command._judge(settings_from_config(make_config()), tmp_path, None) == {}


def write_images(root, seed):
  colors = np.random.default_rng(seed).integers(0, 256, (12, 1, 1, 3))
  images = np.broadcast_to(colors, (12, 8, 8, 3)).astype(np.uint8)
  pairs = [
    {"key": f"k{seed}{i}", "caption": "a color", "split": "heldout" if i > 7 else "train"}
    for i in range(12)
  ]
  write_raw(root / "raw", pairs, images)
  described = stages.describe_files(root / "raw", table.STAGES["raw"].files)
  write_json(root / "raw" / stages.DONE, {"id": stages.id_of(described), "files": described})


class Killed(Exception):
  """Simulates a kill."""


@pytest.mark.slow
def test_a_training_that_ended_on_other_images_does_not_count(tmp_path, monkeypatch, capsys):
  """Kills a training during evaluation, then replaces raw/ by the same number of other pairs."""
  config = make_config()
  config.vqgan.update({"steps": 60, "batch_size": 8, "learning_rate": 3e-3, "restart_every": 0})
  settings = settings_from_config(config)
  write_images(tmp_path / "killed", 0)
  with monkeypatch.context() as patch:
    patch.setattr(vqgan_training, "evaluate", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
      command.main(settings, tmp_path / "killed")
  shutil.rmtree(tmp_path / "killed" / "raw")
  for name in ("killed", "other"):
    write_images(tmp_path / name, 1)
    command.main(settings, tmp_path / name)
  killed, other = (tmp_path / name / "vqgan" for name in ("killed", "other"))
  assert read_json(killed / stages.DONE)["id"] == read_json(other / stages.DONE)["id"]
  assert not (killed / "training").exists()
  capsys.readouterr()
  more = dataclasses.replace(settings, vqgan=dataclasses.replace(settings.vqgan, steps=90))
  for given in (settings, more):
    command.main(given, tmp_path / "other")
  finished = f"{other}: finished already, skipped.\n"
  assert capsys.readouterr().out == (
    f"{finished}{finished}warning: vqgan: kept as an earlier command trained it, for 60 steps; "
    f"config.vqgan.steps is now 90. To train it anew, delete {other} and "
    f"{other.parent / 'train'}.\n"
  )
