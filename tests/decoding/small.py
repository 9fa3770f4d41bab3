"""Makes a tiny generator, requests of every kind, and logits of causal passes without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.request import Hole
from cm3leon_jax.models import transformer
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import mesh_of, random_params

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=56)
IMAGE = 6
POSITIONS = 128
GREEDY = SamplingConfig(top_k=1, text_top_k=1)
# Mixes top-p and contrastive samples in a batch. Settings other than top_k do not compile again.
MIXTURE = SamplingConfig(method="mixture", top_k=20, text_top_k=30)
ANYTHING = dataclasses.replace(
  MIXTURE, temperature=50.0, top_p=1.0, text_temperature=50.0, text_top_p=1.0
)
SEEDS = [11, 12, 13, 14]
A, B = np.array([20, 21, 22]), np.array([30])
CODES, OTHER = VOCAB.image_ids(np.arange(6)), VOCAB.image_ids(np.array([50, 3, 17, 17, 29, 8]))


def model_config(family="opt", **fields):
  sizes = {"vocab_size": 320, "num_layers": 2, "width": 32, "num_heads": 8, "mlp_width": 64}
  kinds = {"dtype": "float32", "attention": "plain", "remat_policy": "none"}
  return ModelConfig(family, **{"max_positions": POSITIONS, **sizes, **kinds, **fields})


def on_mesh(*shape):
  return jax.set_mesh(mesh_of(*(shape or (1, 1, 1))))


def small_generator(family="opt", params=None, align_images=False, **fields):
  model = model_config(family, align_images=align_images)
  fields = {"sampling": SamplingConfig(top_k=20, text_top_k=30), "batch_size": 8, **fields}
  params = random_params(model) if params is None else params
  return Generator(params, GeneratorConfig(model, VOCAB, IMAGE, POSITIONS, **fields))


def guided_requests():
  """Returns two-stream requests for three or seven tokens, with different prompts and plans."""
  image = functools.partial(request_lib.text_to_image, VOCAB, IMAGE)
  hole = request_lib.infill(VOCAB, IMAGE, [(A,), (OTHER[:3], Hole(codes=2), OTHER[5:])])
  return [image(A), image(B), hole, image(A, [(B, CODES), (A, OTHER)])]


def plain_requests():
  """Returns one-stream requests for up to seven tokens: an image, an infill and two documents."""
  return [
    request_lib.unconditional(VOCAB, IMAGE),
    request_lib.infill(VOCAB, IMAGE, [(A, Hole(most_text=6), B), (CODES,)]),
    request_lib.document(VOCAB, IMAGE, [], 7),
    request_lib.document(VOCAB, IMAGE, [A, CODES], 7),
  ]


@functools.partial(jax.jit, static_argnums=0)
def _causal(config, params, tokens, positions):
  model = transformer.bind(config, params)
  hidden = model(tokens, positions, jnp.ones_like(tokens))
  return transformer.logits(hidden, model.output_table())[0]


def full_logits(config, params, tokens):
  """Returns logits [T, V] of ids [T] from one causal pass without a cache, as in training."""
  rows = np.stack([tokens, positions_of(tokens, VOCAB, config.align_images)])
  rows = np.pad(rows, ((0, 0), (0, POSITIONS - len(tokens)))).astype(np.int32)
  return np.asarray(_causal(config, params, rows[:1], rows[1:]))[: len(tokens)]


def teacher_forced(config, params, prompt, ids):
  """Returns logits [G, V] that predict each of `ids` after `prompt`, without a cache."""
  return full_logits(config, params, np.concatenate([prompt, ids]))[len(prompt) - 1 : -1]
