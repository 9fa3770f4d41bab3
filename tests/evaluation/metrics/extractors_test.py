import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from cm3leon_jax.clip.config import CLIPConfig
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, init_params
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from cm3leon_jax.evaluation.metrics.extractors import (
  Extractor,
  load_clip,
  load_dinov2,
  load_inception,
)
from cm3leon_jax.evaluation.metrics.inception import WIDTH, Inception
from tests.clip import huggingface_test
from tests.evaluation.metrics import dinov2_test
from tests.evaluation.metrics.inception_test import random_tensors
from tests.refusals import refused

TINY = CLIPConfig(
  resolution=16, patch=8, image_width=64, image_layers=1, text_width=64, text_layers=1,
  text_length=6, embed_dim=8,
)  # fmt: skip


def some_images(n, height=16, width=16):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


def check(extractor, images, expected):
  features = extractor(images)
  assert features.dtype == np.float32
  assert features.shape == (len(images), extractor.width)
  np.testing.assert_array_equal(features, expected)
  assert json.loads(json.dumps(extractor.identity)) == extractor.identity
  assert len(extractor.identity["tensors"]) == 64


@pytest.mark.slow
def test_inception(tmp_path):
  tensors, path = random_tensors(), tmp_path / "fid.safetensors"
  safetensors.numpy.save_file(tensors, path)
  options = {"devices": jax.devices()[:1], "rows_per_device": 1}
  extractor = load_inception(path, **options)
  assert extractor.name == "inception-v3 (tf1 resize)"
  assert extractor.width == WIDTH
  images = some_images(1)
  check(extractor, images, Inception.load(path, "tf1", **options).embed_images(images))
  about = {"network": "Inception-v3 of the FID", "resize": "tf1"}
  assert extractor.identity == {**about, "tensors": published_weights.digest(tensors)}
  other = load_inception(path, "torch", **options)
  assert other.name == "inception-v3 (torch resize)"
  assert other.identity == extractor.identity | {"resize": "torch"}


def test_the_clip_of_the_run(tmp_path):
  params = init_params(TINY, 32, jax.random.key(0))
  clip = CLIP(TINY, 32, params)
  clip.save(tmp_path / "clip")
  extractor, images = load_clip("", tmp_path), some_images(3)
  assert (extractor.name, extractor.width) == ("clip", 8)
  check(extractor, images, clip.embed_images(images))
  assert extractor.identity["image"] == {"encoder": "vit", "resolution": 16}
  with refused(UserError):
    extractor(some_images(1, 16, 20))
  # With other parameters in the same folder, the identity changes.
  CLIP(TINY, 32, init_params(TINY, 32, jax.random.key(1))).save(tmp_path / "clip")
  assert load_clip("", tmp_path).identity["tensors"] != extractor.identity["tensors"]


def test_a_published_clip(tmp_path):
  """A published CLIP computes in float32, and its identity depends on its image processor."""
  huggingface_test.write_checkpoint(tmp_path, "quick_gelu", huggingface_test.END)
  extractor, images = load_clip(str(tmp_path), "no workdir"), some_images(2, 20, 28)
  check(extractor, images, HFCLIP.load(tmp_path, "float32").embed_images(images))
  assert extractor.identity["image"]["activation"] == "quick_gelu"
  side = huggingface_test.SIDE
  assert extractor.identity["preprocessing"]["crop_size"] == {"height": side, "width": side}
  path = tmp_path / "preprocessor_config.json"
  dinov2_test.change_json(path, resample=2)
  changed = load_clip(str(tmp_path), "no workdir").identity
  assert changed != extractor.identity
  assert changed["tensors"] == extractor.identity["tensors"]


def test_dinov2(tmp_path):
  pytest.importorskip("torch")
  dinov2_test.write_folder(tmp_path)
  extractor, images = load_dinov2(tmp_path), some_images(2, 25, 40)
  assert extractor.name == "dinov2"
  check(extractor, images, dinov2_test.DINOv2.load(tmp_path).embed_images(images))
  config = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
  assert extractor.identity["config"] == config
  stored = dict(dinov2_test.PREPROCESSING)
  stored.pop("image_processor_type")
  assert extractor.identity["preprocessing"] == json.loads(json.dumps(stored))


def test_images_must_be_pixels():
  extractor = Extractor("some", {}, 2, lambda images: np.zeros((len(images), 2), np.float32))
  assert extractor(some_images(3)).shape == (3, 2)
  for images in (some_images(1)[0], some_images(1)[..., :1], some_images(1) / 255):
    with refused(UserError):
      extractor(images)
  with pytest.raises(dataclasses.FrozenInstanceError):
    extractor.name = "other"
