"""Decoding equals the model: cached, batched, padded, guided and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import generate
from cm3leon_jax.decoding.cache import Cache
from cm3leon_jax.decoding.generate import Generator, conditional_prompt, pad_left, unconditional_prompt
from cm3leon_jax.decoding.sampling import SamplingConfig
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import random_params

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=56)
IMAGE_TOKENS = 6
ONE = MeshConfig(1, 1, 1)


def config(family="opt"):
  return ModelConfig(
    family=family, vocab_size=320, num_layers=2, width=32, num_heads=8, mlp_width=64, max_positions=64, dtype="float32"
  )


def mesh(shape=ONE):
  devices = jax.devices()[: shape.data * shape.fsdp * shape.tensor]
  return jax.set_mesh(create_mesh(shape, devices))


def generator(model_config=None, sampling=None):
  model_config = model_config or config()
  params = random_params(model_config)
  return Generator(model_config, params, VOCAB, sampling or SamplingConfig(top_k=20), IMAGE_TOKENS)


def prompts():
  a, b, image = np.array([20, 21, 22]), np.array([30]), VOCAB.image_ids(np.arange(6))
  return [conditional_prompt(VOCAB, a), conditional_prompt(VOCAB, b), conditional_prompt(VOCAB, a, [(b, image), (a, image)])]


@functools.partial(jax.jit, static_argnums=0)
def _causal(model_config, params, tokens):
  model = transformer.bind(model_config, params)
  hidden = model(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
  return transformer.logits(hidden, model.output_table())[0]


def full_logits(model_config, params, tokens):
  """[T] ids -> [T, V] logits of one causal pass without a cache; what follows the sample does not reach it."""
  return np.asarray(_causal(model_config, params, np.pad(tokens, (0, 48 - len(tokens)))[None]))[: len(tokens)]


def teacher_forced(g, prompt, ids):
  """[I, image_size] logits of the image rows for each of `ids` after `prompt`, uncached."""
  return full_logits(g.config, g.params, np.concatenate([prompt, ids[:-1]]))[len(prompt) - 1 :, VOCAB.text_size :]


def test_prompt_literals():
  prompt = conditional_prompt(VOCAB, [7, 8], [([5, 6], [271, 272])])
  assert prompt.tolist() == [1, 5, 6, 3, 271, 272, 3, 7, 8, 3]
  assert unconditional_prompt(VOCAB).tolist() == [1, 5, 3]
  tokens, valid = pad_left([np.array([7]), np.array([8, 9])], 3, VOCAB.pad)
  np.testing.assert_array_equal(tokens, [[0, 0, 7], [0, 8, 9]])
  np.testing.assert_array_equal(valid, [[0, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("family", ["opt", "modern"])
def test_cached_equals_uncached(family):
  """Logits of left-padded, batched prefill and steps equal a plain causal pass over each row by itself."""
  with mesh():
    g = generator(config(family))
    ids = VOCAB.image_ids(np.array([[5, 9, 1, 40], [7, 7, 50, 2], [3, 1, 4, 15]]))
    rows, slots = prompts(), 28
    tokens, valid = pad_left(rows, slots, VOCAB.pad)

    @jax.jit
    def cached(params, tokens, valid, ids):
      model = transformer.bind(g.config, params)
      hidden, cache = generate.prefill(model, tokens, valid, Cache.empty(g.config, 3, slots + 4))
      out = [transformer.logits(hidden, model.output_table())[:, 0]]
      lengths, seen = valid.sum(1), jnp.pad(valid, ((0, 0), (0, 4)), constant_values=True)
      for t in range(3):
        visible = seen & (jnp.arange(slots + 4) <= slots + t)[None]
        hidden, cache = generate.decode_step(model, ids[:, t], lengths + t, slots + t, visible, cache)
        out.append(transformer.logits(hidden, model.output_table())[:, 0])
      return jnp.stack(out, axis=1)

    out = np.asarray(cached(g.params, tokens, valid, ids))
    for row, prompt in enumerate(rows):
      expected = full_logits(g.config, g.params, np.concatenate([prompt, ids[row, :3]]))[len(prompt) - 1 :]
      assert np.abs(expected).max() > 1
      np.testing.assert_allclose(out[row], expected, atol=1e-5, rtol=1e-5)
      assert np.abs(out[row] - out[row - 1]).max() > 0.1  # Control: the rows differ.


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_streams_equal_separate_passes(guidance):
  """log_probs of the batched streams equal those of two separate uncached passes; 1 is the conditional model alone."""
  with mesh():
    g = generator()
    images = g.images(prompts(), [1, 2, 3], guidance)
    for row, prompt in enumerate(prompts()):
      ids = VOCAB.image_ids(images.codes[row])
      conditional, unconditional = (teacher_forced(g, p, ids) for p in (prompt, unconditional_prompt(VOCAB)))
      guided = conditional if guidance == 1 else unconditional + guidance * (conditional - unconditional)
      pick = lambda out, row=row: np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), images.codes[row][:, None], 1)[:, 0]
      np.testing.assert_allclose(images.log_probs[row], pick(guided), atol=3e-5)
      assert np.abs(images.log_probs[row] - pick(unconditional)).max() > 0.1


def test_greedy_takes_the_best_guided_code():
  with mesh():
    g = generator(sampling=SamplingConfig(top_k=20, top_p=1e-6))
    images = g.images(prompts(), [1, 2, 3], 3.0)
    for row, prompt in enumerate(prompts()):
      ids = VOCAB.image_ids(images.codes[row])
      conditional, unconditional = (teacher_forced(g, p, ids) for p in (prompt, unconditional_prompt(VOCAB)))
      np.testing.assert_array_equal(images.codes[row], np.argmax(3 * conditional - 2 * unconditional, -1))


def test_a_prompt_does_not_depend_on_its_batch():
  with mesh():
    g, seeds = generator(), [11, 12, 13]
    together = g.images(prompts(), seeds)
    for row, prompt in enumerate(prompts()):
      alone = g.images([prompt], [seeds[row]])
      np.testing.assert_array_equal(alone.codes[0], together.codes[row])
      np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)
      assert alone.end[0] == together.end[row]


def test_seeds_matter_and_repeat():
  with mesh():
    g, rows = generator(), [prompts()[0]] * 3
    codes = g.text_to_image(rows, [5, 6, 5])
    np.testing.assert_array_equal(codes[0], codes[2])
    assert (codes[0] != codes[1]).any()


def test_image_span_is_exact():
  """Exactly image_tokens codes, then `</s>` or `<break>`; both ends occur."""
  ends = set()
  with mesh():
    g = generator(sampling=SamplingConfig(temperature=3.0, top_k=20, top_p=1.0))
    for seed in range(0, 64, 4):
      images = g.images([prompts()[1]] * 4, range(seed, seed + 4), 1.0)
      assert images.codes.shape == (4, IMAGE_TOKENS)
      assert images.codes.min() >= 0
      assert images.codes.max() < VOCAB.image_size
      ends |= set(images.end.tolist())
  assert ends == {VOCAB.eos, VOCAB.brk}


def test_guidance_does_not_recompile(caplog):
  with mesh(), jax.log_compiles():
    compiled = lambda: sum("Compiling jit(generate_images)" in r.getMessage() for r in caplog.records)
    g = generator(sampling=SamplingConfig(top_k=3))
    codes = [g.text_to_image(prompts(), [1, 2, 3], alpha) for alpha in (1.0, 3.0, 5.0)]
    assert compiled() == 1
    assert (codes[0] != codes[2]).any()


@functools.cache
def on_one_device():
  with mesh():
    return generator().images(prompts(), [1, 2, 3])


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_sharded_equals_one_device(shape):
  with mesh(MeshConfig(*shape)):
    images = generator().images(prompts(), [1, 2, 3])
  np.testing.assert_array_equal(images.codes, on_one_device().codes)
  np.testing.assert_allclose(images.log_probs, on_one_device().log_probs, atol=1e-5)
  np.testing.assert_array_equal(images.end, on_one_device().end)


def test_bad_prompts():
  with mesh():
    g = generator()
    with pytest.raises(UserError, match="at most 58 leave room"):
      g.images([np.ones(59, np.int32)], [0])
    with pytest.raises(UserError, match="one seed for each"):
      g.images(prompts(), [0])
  with pytest.raises(UserError, match="empty"):
    conditional_prompt(VOCAB, [])
