"""Tests that transformers computes this project's logits from exports, in fp32 and fp64.

Weights are random and not small: logits have a standard deviation of at least 1. The vocabulary has
its full size, so that ids of image codes are above 56,320.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.export import huggingface
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import layouts, stored
from tests.generation.run import one_device
from tests.models.tiny import SIZES, model_logits, random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = VocabLayout()
LENGTH, PADDED, GENERATED = 24, 7, 256
FP32, FP64 = 1e-4, 1e-10  # Maximum difference of logits.
PLAIN = {"attention": "plain", "remat_policy": "none"}
CONFIG = ModelConfig(vocab_size=VOCAB.size, max_positions=320, **PLAIN, **SIZES)
MODELS = {
  "opt": CONFIG,
  "opt-gelu": dataclasses.replace(CONFIG, activation="gelu"),
  "opt-gelu_tanh": dataclasses.replace(CONFIG, activation="gelu_tanh"),
  "modern": dataclasses.replace(CONFIG, family="modern"),
  "grouped": dataclasses.replace(CONFIG, family="modern", num_kv_heads=2),
}


def rows():
  """Returns ids, positions and mask, each [3, LENGTH]; the second row is padded on the left."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB.size, (3, LENGTH)).astype(np.int32)
  tokens[:, ::3] = VOCAB.image_ids(rng.integers(0, VOCAB.image_size, tokens[:, ::3].shape))
  tokens[2, -1] = VOCAB.size - 1
  mask = np.ones_like(tokens)
  mask[1, :PADDED] = 0
  tokens[1, :PADDED] = VOCAB.pad
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
  return tokens, positions, mask


def write(folder, config, params):
  described = layouts.hf_config(config, VOCAB)
  tensors = huggingface.tensors_of(stored.of_tree(params), config)
  huggingface.write_model(folder, described, tensors, VOCAB, None, "float32")


class Rotary(torch.nn.Module):
  """Computes rotary positions in fp64. The module of transformers' Qwen3 always uses fp32."""

  def __init__(self, head_dim, base):
    super().__init__()
    self.frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

  def forward(self, _, position_ids):
    angles = position_ids[..., None] * self.frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def use_fp64_throughout(model):
  """Replaces the norms and rotary positions of Qwen3 by modules that compute in fp64."""
  config = model.config
  model.model.rotary_emb = Rotary(config.head_dim, config.rope_parameters["rope_theta"])
  for module in list(model.modules()):
    for name, norm in list(module.named_children()):
      if type(norm).__name__ == "Qwen3RMSNorm":
        wide = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
        wide.weight = norm.weight
        setattr(module, name, wide)


def load(folder, dtype):
  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
  assert model.dtype == dtype
  if dtype == torch.float64 and model.config.model_type == "qwen3":
    use_fp64_throughout(model)
  return model


def theirs(folder, dtype=torch.float32, change=lambda model: None):
  """Returns logits [3, LENGTH, V] from transformers, whose OPT derives positions from the mask."""
  tokens, positions, mask = (torch.from_numpy(x).long() for x in rows())
  model = load(folder, dtype)
  change(model)
  more = {} if model.config.model_type == "opt" else {"position_ids": positions}
  with torch.no_grad():
    return model(tokens, attention_mask=mask, **more).logits.numpy()


def difference(a, b):
  """Returns the largest difference between logits, without padding."""
  return np.abs(a - b)[rows()[2] == 1].max()


def ours(config, params):
  with one_device():
    return np.asarray(model_logits(config, params, *rows()))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """With several threads, torch spends more time waiting than computing."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns a function from a model's name to (config, parameters, export folder, JAX logits)."""
  cache = {}

  def make(name):
    if name not in cache:
      config = MODELS[name]
      with one_device():
        params = jax.device_get(random_params(config))
      folder = tmp_path_factory.mktemp(name)
      write(folder, config, params)
      cache[name] = config, params, folder, ours(config, params)
    return cache[name]

  return make


@pytest.mark.parametrize("name", ["opt", "modern", "grouped"])
def test_fp64_logits_of_transformers_differ_by_less_than_1e_10(made, name):
  config, params, folder, _ = made(name)
  with jax.enable_x64(True):
    logits = ours(
      dataclasses.replace(config, dtype="float64"),
      jax.tree.map(lambda x: np.asarray(x, np.float64), params),
    )
    assert logits.dtype == np.float64
  assert difference(theirs(folder, torch.float64), logits) < FP64


def set_eps(model):
  norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
  assert norms
  for norm in norms:
    norm.eps = 1e-6


def no_offset(tensors):
  tensors["model.decoder.embed_positions.weight"] = np.roll(
    tensors["model.decoder.embed_positions.weight"], -layouts.LAYOUTS["opt"].first_position, axis=0
  )


def swap(names):
  def change(tensors):
    q, k = names
    tensors[q], tensors[k] = tensors[k], tensors[q]

  return change


def exchange_key_heads(tensors):
  key = f"{QWEN3}.k_proj.weight"
  tensors[key] = np.roll(tensors[key], len(tensors[key]) // 2, axis=0)


def transpose(name):
  def change(tensors):
    tensors[name] = np.ascontiguousarray(tensors[name].T)

  return change


OPT, QWEN3 = "model.decoder.layers.1.self_attn", "model.layers.1.self_attn"
# (model, mistake, changes of its tensors, of its config.json, and of the loaded model)
WRONG = [
  ("opt", "eps", None, {}, set_eps),
  ("opt", "activation", None, {"activation_function": "gelu"}, None),
  ("opt-gelu", "activation", None, {"activation_function": "gelu_pytorch_tanh"}, None),
  ("opt", "offset", no_offset, {}, None),
  ("opt", "q and k", swap([f"{OPT}.q_proj.weight", f"{OPT}.k_proj.weight"]), {}, None),
  ("opt", "transposed", transpose(f"{OPT}.out_proj.weight"), {}, None),
  ("modern", "eps", None, {"rms_norm_eps": 1e-5}, None),
  ("modern", "activation", None, {"hidden_act": "gelu"}, None),
  ("modern", "q and k", swap([f"{QWEN3}.q_norm.weight", f"{QWEN3}.k_norm.weight"]), {}, None),
  ("modern", "transposed", transpose(f"{QWEN3}.o_proj.weight"), {}, None),
  ("grouped", "key heads", exchange_key_heads, {}, None),
]


@pytest.mark.parametrize(
  ("name", "wrong", "tensors", "config", "model"), WRONG, ids=lambda x: x if type(x) is str else ""
)
def test_the_comparison_finds_a_wrong_model(made, tmp_path, name, wrong, tensors, config, model):
  """Negative controls: with each mistake, the comparison fails in fp32."""
  _, _, folder, logits = made(name)
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  if tensors:
    loaded = safetensors_numpy.load_file(copy / huggingface.WEIGHTS)
    tensors(loaded)
    safetensors_numpy.save_file(loaded, copy / huggingface.WEIGHTS, {"format": "pt"})
  described = json.loads((copy / "config.json").read_text())
  assert described.keys() >= config.keys()
  (copy / "config.json").write_text(json.dumps(described | config))
  found = theirs(copy, change=model or (lambda _: None))
  assert difference(found, logits) > FP32, wrong
