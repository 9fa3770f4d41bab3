import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.models import transformer
from cm3leon_jax.models.codebook_start import params_from_codebook, whitened
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import CONFIG, mesh_of

VOCAB = VocabLayout(num_special=16, text_size=280, image_size=40)
MODERN = dataclasses.replace(
  CONFIG, family="modern", vocab_size=VOCAB.size, width=256, init_std=0.02, embed_std=0.1
)


def codebook(rng=None):
  """Returns 40 codes of 6 dimensions; the last 20 are the first 20 with a little noise added."""
  rng = rng or np.random.default_rng(0)
  half = rng.normal(size=(20, 6)) * [5, 3, 1, 1, 1, 0.2]
  return np.concatenate([half, half + 0.01 * rng.normal(size=half.shape)]).astype(np.float32) + 7


def start(config, shape=(1, 1, 1)):
  with jax.set_mesh(mesh_of(*shape)):
    key = jax.random.key(3)
    return (
      jax.device_get(params_from_codebook(config, VOCAB.text_size, codebook(), key)),
      jax.device_get(transformer.init_params(config, key)),
    )


def test_whitened_columns_are_uncorrelated_and_of_variance_1():
  white = whitened(codebook())
  np.testing.assert_allclose(white.T @ white / len(white), np.eye(6), atol=1e-4)
  np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)


def test_a_direction_in_which_all_codes_agree_stays_0():
  white = whitened(np.concatenate([codebook(), np.ones((40, 1), np.float32)], axis=1))
  assert (np.abs(white) > 1e-6).any(0).sum() == 6


@pytest.mark.parametrize("family", ["opt", "modern"])
def test_only_codes_change_and_codes_that_look_alike_are_near(family):
  config = dataclasses.replace(MODERN, family=family, codebook_start=0.5)
  params, random = start(config)
  assert params.keys() == random.keys()
  for name in {"embed", "head"} & params.keys():
    texts, codes = params[name][: VOCAB.text_size], params[name][VOCAB.text_size :]
    np.testing.assert_array_equal(texts, random[name][: VOCAB.text_size])
    assert codes.std() == pytest.approx(random[name][VOCAB.text_size :].std(), rel=0.1)
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    near = (unit[:20] * unit[20:]).sum(1)
    assert near.mean() == pytest.approx(0.5, abs=0.06)
    assert np.abs((unit[:20] * np.roll(unit[20:], 7, 0)).sum(1)).mean() < 0.35
  changed = {"embed", "head"} & params.keys()
  for name in params.keys() - changed:
    jax.tree.map(np.testing.assert_array_equal, params[name], random[name])
