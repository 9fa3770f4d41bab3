"""Compares the bundled model and its image tokenizer on an accelerator with the CPU."""

import jax
import numpy as np
import pytest

from cm3leon_jax import CM3Leon

pytestmark = [pytest.mark.gpu, pytest.mark.tpu]

PROMPTS = ["a red bell", "a green cat to the left of a blue car"]


@pytest.fixture(scope="module")
def models():
  """Returns the bundled model on the device and on the CPU."""
  return [CM3Leon.load("scenes", devices=jax.devices(p)[:1]) for p in (None, "cpu")]


def test_the_model_draws_the_images_of_the_cpu(models):
  """Takes the most probable codes. A near tie may change a code and those that follow it."""
  found, expected = (
    [np.asarray(m.generate(prompt, top_k=1)[0].image) for prompt in PROMPTS] for m in models
  )
  equal = [(a == b).all(axis=-1).mean() for a, b in zip(found, expected)]
  assert max(equal) > 0.99
  assert (found[0] == expected[1]).all(axis=-1).mean() < 0.99  # Control: the images differ.


def test_the_image_tokenizer_gives_the_codes_of_the_cpu(models):
  """Encodes and decodes noise, for which many codes are nearly as close as the closest."""
  images = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), np.uint8)
  tokenizers = [model.pipeline.image_tokenizer for model in models]
  with jax.default_device(jax.devices()[0]):
    codes = tokenizers[0].encode(images)
    decoded = tokenizers[0].decode(codes)
  with jax.default_device(jax.devices("cpu")[0]):
    expected = tokenizers[1].encode(images)
    decoded_on_cpu = tokenizers[1].decode(codes)
  assert (codes == expected).mean() > 0.99
  assert np.abs(np.int32(decoded) - np.int32(decoded_on_cpu)).max() <= 1
  assert len(np.unique(codes)) > 10  # Control: the codes are not all the same.
