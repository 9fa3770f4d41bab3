"""Tests what launch.train_vqgan prints of scenes."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.commands.train_vqgan import _judge_scenes
from cm3leon_jax.data import ingest
from cm3leon_jax.data.scene_world import ScenesConfig
from cm3leon_jax.shards import Runner
from cm3leon_jax.tokenizers import vqgan
from tests.tokenizers.vqgan_test import LOCAL


@dataclasses.dataclass(frozen=True)
class Half:
  """A tokenizer that keeps the odd images and blanks the even ones."""

  config: vqgan.VQGANConfig

  def encode(self, images):
    return images

  def decode(self, codes):
    return np.where(np.arange(len(codes))[:, None, None, None] % 2, codes, np.uint8(255))


@pytest.mark.parametrize("style", ["filled", "outlined"])
def test_reconstructions_of_scenes_are_judged(tmp_path, style):
  raw = ingest.RawConfig(source="scenes", resolution=48, max_texts=0)
  config = ScenesConfig(train=20, heldout=24, style=style)
  ingest.prepare(raw, ingest.parts_of(raw, config), tmp_path / "raw", Runner(), config)
  sizes = dataclasses.replace(LOCAL, resolution=48)
  assert _judge_scenes(tmp_path, Half(sizes), style) == {
    "real_scenes_right": 1.0,
    "reconstructed_scenes_right": 0.5,
  }
  params = jax.jit(lambda key: vqgan.init_params(sizes, 8, key))(jax.random.key(0))
  untrained = vqgan.ImageTokenizer(sizes, 8, params)
  assert _judge_scenes(tmp_path, untrained, style)["reconstructed_scenes_right"] == 0.0


def test_pairs_without_facts_are_not_judged(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "texts.jsonl").write_text('{"key": "a", "text": "b", "split": "train"}\n')
  raw = ingest.RawConfig(source=str(tmp_path / "in"))
  ingest.prepare(raw, ingest.parts_of(raw), tmp_path / "raw", Runner())
  assert _judge_scenes(tmp_path, None) == {}
