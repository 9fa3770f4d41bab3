"""Tests which interrupted trainings launch.train_clip continues (see also train_vqgan_test)."""

from unittest import mock

import pytest

from cm3leon_jax.commands import train_clip
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers import text
from cm3leon_jax.training.image_models import trainer
from tests.commands.train_vqgan_test import Killed, write_images
from tests.data.stores import VOCAB
from tests.generation.run import CAPTIONS, SETTINGS


def test_a_training_is_one_of_its_pairs_and_its_text_tokenizer(tmp_path):
  write_images(tmp_path, 0)
  # Has enough different words for a vocabulary of 512.
  words = [f"{CAPTIONS[i % 5]} word{i}" for i in range(200)] * 3
  tokenizer = tmp_path / "text_tokenizer"
  text.train_text_tokenizer(words, VOCAB, SETTINGS.text_tokenizer, tokenizer)
  write_json(tokenizer / stages.DONE, {"id": "texts"})
  with mock.patch.object(trainer, "train", side_effect=Killed) as training, pytest.raises(Killed):
    train_clip.main(SETTINGS, tmp_path)
  raw = read_json(tmp_path / "raw" / stages.DONE)["id"]
  assert training.call_args.args[0].about["inputs"] == {"raw": raw, "text_tokenizer": "texts"}
