import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import REMAT_POLICIES
from cm3leon_jax.models import attention, transformer
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import CONFIG, mesh_of, model_logits, random_params

L = 12
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, L)).astype(np.int32)
POSITIONS = np.tile(np.arange(L, dtype=np.int32), (4, 1))
SEGMENTS = np.ones((4, L), np.int32)
FAMILIES = pytest.mark.parametrize("family", ["opt", "modern", "chameleon"])


def config_of(family, **fields):
  return dataclasses.replace(CONFIG, family=family, **fields)


@FAMILIES
def test_no_gradient_reaches_a_later_token(family):
  """Tests causality: logits at t do not depend on the embeddings of later tokens."""
  config = config_of(family)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(config)
    tokens = np.arange(L, dtype=np.int32)[None]  # A different token at every position.
    t = 5
    at_t = np.zeros((1, L, 1), np.float32)
    at_t[0, t] = 1
    # Uses only the logits of ids that are not input tokens, so that a tied table gets gradients for
    # input tokens only through the input.
    unused = (np.arange(config.vocab_size) >= L).astype(np.float32)[None, None]

    def square(p):
      logits = model_logits(config, p, tokens, POSITIONS[:1], SEGMENTS[:1])
      return jnp.sum(at_t * unused * logits**2)

    gradient = jax.jit(jax.grad(square))(params)["embed"]
  norms = np.linalg.norm(np.asarray(gradient)[:L], axis=1)
  assert (norms[: t + 1] > 1e-6).all()
  assert (norms[t + 1 :] == 0).all()


@FAMILIES
def test_packed_samples_do_not_see_each_other(family):
  config = config_of(family)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(config)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    positions = np.array([[*range(5), *range(7)]], np.int32)
    packed = model_logits(config, params, TOKENS[:1], positions, segments)
    alone = model_logits(config, params, TOKENS[:1, 5:], positions[:, 5:], segments[:, 5:])
    leaking = model_logits(config, params, TOKENS[:1], positions, SEGMENTS[:1])
  np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5)
  assert np.abs(leaking[:, 5:] - alone).max() > 0.1


def test_logits_of_a_pair_do_not_depend_on_the_alignment():
  """Alignment shifts all positions of a pair equally, but changes distances after a neighbor."""
  vocab = VocabLayout(num_special=8, text_size=264, image_size=16)
  config = config_of("modern", vocab_size=vocab.size, align_images=True)
  code, word = vocab.text_size, vocab.num_special
  pair = [word + 1, word + 2, vocab.brk, code + 3, code + 4, code + 5]
  neighbor = [word + 5, vocab.brk, code + 3, code + 4, code + 1, vocab.brk]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(config)

    def logits(tokens, align_images):
      tokens = np.array([[vocab.eos, *tokens]], np.int32)
      positions = positions_of(tokens[0], vocab, align_images)[None]
      return model_logits(config, params, tokens, positions, np.ones_like(tokens))

    alone = logits(pair, False)
    assert np.abs(alone).max() > 1
    np.testing.assert_allclose(logits(pair, True), alone, atol=1e-5)
    after = [logits([*neighbor, *pair], align_images) for align_images in (False, True)]
  np.testing.assert_allclose(after[0][:, : len(neighbor)], after[1][:, : len(neighbor)], atol=1e-5)
  assert np.abs(after[0] - after[1])[:, -len(pair) :].max() > 0.1


@FAMILIES
def test_scanned_layers_equal_unrolled(family):
  config = config_of(family)

  def attend(q, k, v):
    return attention.causal_attention(q, k, v, jnp.asarray(SEGMENTS))

  @jax.jit
  def unrolled_logits(params):
    one = config_of(family, num_layers=1)
    model = transformer.bind(config, params)
    x = model.embed_tokens(jnp.asarray(TOKENS), jnp.asarray(POSITIONS))
    for i in range(config.num_layers):
      layer = transformer.bind(
        one, {**params, "blocks": jax.tree.map(lambda w, i=i: w[i : i + 1], params["blocks"])}
      )
      block = jax.tree.map(lambda w: w[0], layer.blocks)
      x = block(x, jnp.asarray(POSITIONS), attend)
    return transformer.logits(model.final_norm(x), model.output_table())

  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(config)
    scanned = model_logits(config, params, TOKENS, POSITIONS, SEGMENTS)
    unrolled = unrolled_logits(params)
  np.testing.assert_allclose(scanned, unrolled, atol=2e-5)


REMAT = [(p, f) for p in REMAT_POLICIES if p not in ("none", "offload") for f in ("opt", "modern")]
FEW = [("minimal", "opt")]


@pytest.mark.parametrize(
  ("policy", "family"),
  [*FEW, *(pytest.param(*x, marks=pytest.mark.slow) for x in REMAT if x not in FEW)],
)
def test_remat_changes_nothing(policy, family):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(config_of(family))

    def gradients(name):
      config = config_of(family, remat_policy=name)

      def square(p):
        return jnp.mean(model_logits(config, p, TOKENS, POSITIONS, SEGMENTS) ** 2)

      return jax.tree.leaves(jax.jit(jax.grad(square))(params))

    for a, b in zip(gradients("none"), gradients(policy)):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_remat_policy_keeps():
  """The forward pass saves the inputs of layers and only the values that the policy names."""
  D, F = CONFIG.width, CONFIG.mlp_width
  expected = {"full": [], "save_attention": [D, D], "save_qkv": [D] * 4, "minimal": [D] * 4 + [F]}
  for policy, widths in expected.items():
    config = config_of("opt", remat_policy=policy)
    with jax.set_mesh(mesh_of(1, 1, 1)):
      forward = functools.partial(
        model_logits, config, tokens=TOKENS, positions=POSITIONS, segment_ids=SEGMENTS
      )
      _, pullback = jax.eval_shape(functools.partial(jax.vjp, forward), random_params(config))
      residuals = jax.tree.leaves(pullback)
    kept = sorted(
      math.prod(x.shape[3:]) for x in residuals if x.shape[:3] == (CONFIG.num_layers, *TOKENS.shape)
    )
    assert kept == sorted([D, *widths]), policy


@FAMILIES
@pytest.mark.parametrize(
  "shape", [(2, 2, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, 4, 2), (1, 2, 4)))]
)
def test_sharded_equals_one_device(family, shape):
  config = config_of(family)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    expected = np.asarray(model_logits(config, random_params(config), TOKENS, POSITIONS, SEGMENTS))
  with jax.set_mesh(mesh_of(*shape)):
    found = model_logits(config, random_params(config), TOKENS, POSITIONS, SEGMENTS)
    assert jax.typeof(found).sharding.spec[2] == "tensor"
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_rotation_depends_on_distance_alone():
  q, k = map(jnp.asarray, np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)))

  @jax.jit
  def score(i, j):
    rotated = transformer.rotate(q, jnp.array([[i]])), transformer.rotate(k, jnp.array([[j]]))
    return jnp.sum(rotated[0] * rotated[1])

  assert float(score(7, 3)) == pytest.approx(float(score(14, 10)), abs=1e-5)
  assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotation_literals():
  """Rotates x[i] and x[i + H / 2] together by the angle position x base ** (-i / (H / 2))."""
  x = jnp.asarray(np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4))
  rotate = jax.jit(transformer.rotate, static_argnames="base")
  for position in (0, 3):
    angles = position * np.array([1.0, 0.01])  # 10,000 ** -0 and 10,000 ** -0.5.
    found = rotate(x, jnp.array([[position]]))[0, 0, 0]
    np.testing.assert_allclose(found, [*np.cos(angles), *np.sin(angles)], atol=1e-6)
  other = rotate(x, jnp.array([[3]]), base=100.0)[0, 0, 0]
  np.testing.assert_allclose(other[1], np.cos(0.3), atol=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_norms_of_bfloat16_are_computed_in_fp32(center):
  x = (jax.random.normal(jax.random.key(0), (4, 512)) + 3).astype(jnp.bfloat16)
  found = transformer.normalize(x, 1e-6, center)
  exact = np.asarray(x, np.float64)
  exact -= exact.mean(-1, keepdims=True) if center else 0
  exact /= np.sqrt((exact**2).mean(-1, keepdims=True))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


def plain_logits(config, params, tokens, positions):
  """Computes logits [L, V] of a sample in NumPy in fp64. The activation of `opt` is ReLU."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  modern, head = config.family != "opt", config.head_dim
  eps = 1e-6 if config.family == "modern" else 1e-5

  def norm(x, parameters):
    if parameters.keys() != {"scale"}:
      x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * parameters.get("scale", 1) + parameters.get("bias", 0)

  def turn(x):
    angles = positions[:, None, None] * config.rope_base ** (-np.arange(head // 2) / (head // 2))
    turned = (x[..., : head // 2] + 1j * x[..., head // 2 :]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)

  x = params["embed"][tokens]
  x = x if modern else x + params["positions"][positions]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
    q, k, v = np.einsum("LD,cDNH->cLNH", norm(x, layer.get("norm1", {})), layer["qkv"])
    if modern:
      q, k = turn(norm(q, layer["q_norm"])), turn(norm(k, layer["k_norm"]))
    scores = np.einsum("LNH,TNH->NLT", q, k) / np.sqrt(head)
    weights = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("NLT,TNH,NHD->LD", weights, v, layer["out"])
    h = norm(x, layer.get("norm2", {}))
    up = h @ layer["up"]
    gate = h @ layer["gate"] if modern else 0
    x = x + (up * gate / (1 + np.exp(-gate)) if modern else np.maximum(up, 0)) @ layer["down"]
  return norm(x, params.get("final_norm", {})) @ params["head" if modern else "embed"].T


@pytest.mark.parametrize(
  ("family", "fields"),
  [
    ("opt", {}),
    ("modern", {"head_size": 6, "rope_base": 100.0}),
    ("chameleon", {"rope_base": 1e4}),
  ],
)
def test_a_decoder_is_that_of_plain_numpy(family, fields):
  config = config_of(family, dtype="float64", **fields)
  with jax.enable_x64(True), jax.set_mesh(mesh_of(1, 1, 1)):
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params(config))
    found = model_logits(config, params, TOKENS[:1], POSITIONS[:1] + 3, SEGMENTS[:1])[0]
  expected = plain_logits(config, params, TOKENS[0], POSITIONS[0] + 3)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
