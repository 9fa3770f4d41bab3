"""Compares the family `chameleon` with ChameleonForConditionalGeneration in transformers.

Weights are random and not small, also scales and biases of norms. Logits come from `model.model`
and `lm_head`, because the forward pass of the class masks the logits of image codes.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import shard
from cm3leon_jax.models import transformer
from cm3leon_jax.planning import shares
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import int8, layouts, placed, stored, tensor_files
from cm3leon_jax.weights.stored_tensors import StoredTensors
from tests.decoding.small import GREEDY
from tests.models.tiny import mesh_of, model_logits, random_params, types_of
from tests.refusals import refused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = VocabLayout(num_special=8, text_size=536, image_size=64)
LENGTH, IMAGE, TOLERANCE = 24, 9, 1e-4
CONFIG = ModelConfig(
  "chameleon", vocab_size=VOCAB.size, num_layers=2, width=64, num_heads=4, mlp_width=160,
  max_positions=64, dtype="float32", attention="plain", remat_policy="none",
)  # fmt: skip
GROUPED = dataclasses.replace(CONFIG, num_kv_heads=2)
MODELS = {
  "plain": CONFIG,
  "grouped": GROUPED,
  "swin": dataclasses.replace(GROUPED, swin_norm=True, rope_base=500.0),
}
VQ = {"embed_dim": 8, "num_embeddings": 64, "latent_channels": 8, "resolution": 8}
VQ |= {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}


def parameters(config):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    return jax.device_get(random_params(config))


def theirs(config, params):
  """Returns the model in transformers with our parameters and config."""
  names = {f"t{i}": i for i in range(VOCAB.text_size)} | {"<image>": 7}
  names |= {f"IMGIMG{chr(65 + c // 10)}{chr(65 + c % 10)}Z": VOCAB.text_size + c for c in range(64)}
  described = {**layouts.hf_config(config, VOCAB), "vocabulary_map": names, "vq_config": VQ}
  model = transformers.ChameleonForConditionalGeneration(
    transformers.ChameleonConfig.from_dict(described)
  ).eval()
  tensors = layouts.tensors_of(layouts.layout_of(config), stored.of_tree(params))
  arrays = {x.name: torch.from_numpy(np.array(x.make())) for x in tensors}
  missing, unexpected = model.load_state_dict(arrays, strict=False)
  assert not unexpected
  assert all(name.startswith("model.vqmodel.") for name in missing)
  return model


def rows():
  """Returns ids, positions and mask [3, LENGTH] of a text, a caption and an image in the middle."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(VOCAB.num_special, VOCAB.text_size, (3, LENGTH)).astype(np.int32)
  for row, start in ((1, LENGTH - IMAGE), (2, 6)):
    codes = rng.integers(0, VOCAB.image_size, IMAGE)
    tokens[row, start : start + IMAGE] = VOCAB.image_ids(codes)
  mask = np.ones_like(tokens)
  mask[0, :7] = 0
  return tokens, np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32), mask


@functools.partial(jax.jit, static_argnums=0)
def _outputs(config, params, *arrays):
  model = transformer.bind(config, params)
  hidden = model(*(shard(x, "batch", "length") for x in arrays))
  return hidden, transformer.logits(hidden, model.output_table())


def outputs(config, params):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    return jax.device_get(_outputs(config, params, *rows()))


def difference(a, b):
  return np.abs(a - b)[rows()[2] == 1].max()


def other_heads(params):
  """Exchanges the scales and biases of heads."""
  blocks = params["blocks"]
  norm = jax.tree.map(lambda x: np.roll(x, 1, axis=1), blocks["q_norm"])
  return {**params, "blocks": {**blocks, "q_norm": norm}}


def swapped_halves(params):
  """Exchanges the halves of queries and keys, so that rotary positions turn them backwards."""
  swap = functools.partial(np.roll, shift=CONFIG.head_dim // 2, axis=-1)
  blocks = params["blocks"]
  norms = {name: jax.tree.map(swap, blocks[name]) for name in ("q_norm", "k_norm")}
  qkv = np.concatenate([swap(blocks["qkv"][:, :2]), blocks["qkv"][:, 2:]], axis=1)
  return {**params, "blocks": {**blocks, **norms, "qkv": qkv}}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_are_those_of_transformers(name):
  config = MODELS[name]
  params = parameters(config)
  hidden, logits = outputs(config, params)
  tokens, positions, mask = (torch.from_numpy(x).long() for x in rows())
  model = theirs(config, params)
  with torch.no_grad():
    expected = model.model(tokens, attention_mask=mask, position_ids=positions).last_hidden_state
    expected_logits = model.lm_head(expected).numpy()
  assert expected_logits.std() > 1
  assert difference(hidden, expected.numpy()) < TOLERANCE
  assert difference(logits, expected_logits) < TOLERANCE
  for change in (other_heads, swapped_halves) if name == "plain" else ():  # Negative controls.
    assert difference(outputs(config, change(params))[1], expected_logits) > 0.1


def greedy(model, prompt, kinds):
  """Generates a token for each mask of allowed ids in `kinds`, without a cache. Stops at <eoss>."""
  tokens = prompt.tolist()
  for allowed in kinds:
    with torch.no_grad():
      hidden = model.model(torch.tensor([tokens])).last_hidden_state[:, -1]
    logits = np.where(allowed, model.lm_head(hidden)[0].detach().numpy(), -np.inf)
    assert np.ptp(np.sort(logits)[-2:]) > 10 * TOLERANCE  # Rounding does not decide.
    tokens.append(int(logits.argmax()))
    if tokens[-1] == VOCAB.eoss:
      break
  return tokens[len(prompt) :]


def test_greedy_decoding_with_a_cache_is_that_of_transformers():
  params, ids = parameters(GROUPED), np.arange(VOCAB.size)
  codes, text = VOCAB.is_image(ids), (ids >= VOCAB.num_special) & (ids < VOCAB.text_size)
  tokens = rows()[0]
  image = request.text_to_image(VOCAB, IMAGE, tokens[0, -6:])
  holes = [(request.Hole(most_text=8),), (tokens[1, -IMAGE:],)]
  requests = [
    request.Request(image.streams[:1], image.plan[:1]),
    request.infill(VOCAB, IMAGE, holes),
  ]
  kinds = [codes] * IMAGE, [text, *[text | (ids == VOCAB.eoss)] * 7, ids == VOCAB.eoss]
  fields = {"sampling": GREEDY, "batch_size": 2, "image_head": False}
  with jax.set_mesh(mesh_of(1, 1, 1)):
    generator = Generator(params, GeneratorConfig(GROUPED, VOCAB, IMAGE, 64, **fields))
    results = [result.tokens.tolist() for result in generator.generate(requests, [1, 2])]
  model, other = theirs(GROUPED, params), theirs(GROUPED, other_heads(params))
  for generated, one, allowed in zip(results, requests, kinds):
    assert generated == greedy(model, one.streams[0], allowed)
    assert generated != greedy(other, one.streams[0], allowed)  # Negative control.


def test_tensors_and_config_are_read_back(tmp_path):
  config = MODELS["swin"]
  tensors = layouts.tensors_of(layouts.layout_of(config), stored.of_tree(parameters(config)))
  tensor_files.write(tmp_path, tensors, 100_000)
  with jax.set_mesh(mesh_of(1, 2, 2)):
    params = placed.load(StoredTensors(tmp_path), config)
    assert params["blocks"]["k_norm"]["bias"].sharding.spec[1] == "tensor"
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), parameters(config))
  fields = layouts.config_of(layouts.hf_config(config, VOCAB))["model"]
  assert dataclasses.replace(CONFIG, **fields) == config
  with refused(UserError, "ChameleonForConditionalGeneration"):
    changed = dataclasses.replace(config, head_size=32)
    layouts.layout_of(changed).check(changed)


def test_every_parameter_is_counted_and_norms_stay_in_floating_point():
  with jax.set_mesh(mesh_of(1, 1, 1)):
    types = types_of(transformer.init_params, GROUPED)
  assert sum(shares.parameters(GROUPED)) == transformer.count_params(types)
  shapes = layouts.shapes_of(GROUPED)
  tensors = int8.quantized(
    [tensor_files.Tensor(name, shape, "float32", None) for name, shape in shapes.items()]
  )
  packed = [x.name for x in tensors if x.name.endswith("_packed")]
  assert len(packed) == GROUPED.num_layers * 7
  assert not any("norm" in name for name in packed)


def test_gradients_of_heads_on_several_devices_are_those_of_one():
  """Scales and biases of heads are split over the mesh axis `tensor`."""

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(config, params):
    arrays = (np.concatenate([x, x[:1]]) for x in rows())
    return jax.grad(lambda p: (model_logits(config, p, *arrays) ** 2).mean())(params)["blocks"]

  results = []
  for shape in ((1, 1, 1), (1, 2, 2)):
    with jax.set_mesh(mesh_of(*shape)):
      results.append(jax.device_get(gradients(GROUPED, random_params(GROUPED))))
  assert np.abs(results[0]["k_norm"]["bias"]).max() > 1e-2
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *results)
