import dataclasses

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from cm3leon_jax.export import formats, huggingface
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers import text
from cm3leon_jax.weights import int8, stored
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import model_logits, random_params


def test_literals():
  values, scale = int8.quantize(np.array([[1.0, -2.54], [0.0, 0.0]], np.float32))
  np.testing.assert_array_equal(values, [[50, -127], [0, 0]])
  np.testing.assert_allclose(scale, [[0.02], [1.0]], rtol=1e-6)
  packed = int8.pack(np.array([[-128, -127, 0, 1]], np.int8))
  np.testing.assert_array_equal(packed, [[-2122317568]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_element_is_off_by_half_a_scale(dtype):
  weight = np.random.default_rng(0).normal(size=(9, 30)).astype(np.float32)
  values, scale = int8.quantize(weight, dtype)
  scale = scale.astype(np.float32)
  allowed = scale / 2 + 127 * np.abs(scale - np.abs(weight).max(1, keepdims=True) / 127)
  assert (np.abs(values * scale - weight) <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("width", [30, 32, 33])
def test_packed_numbers_are_those_of_compressed_tensors(width):
  torch = pytest.importorskip("torch")
  helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
  values = np.random.default_rng(0).integers(-128, 128, (5, width)).astype(np.int8)
  expected = helpers.pack_to_int32(torch.from_numpy(values), 8).numpy()
  np.testing.assert_array_equal(int8.pack(values), expected)


@pytest.mark.parametrize(("family", "key_heads"), [("opt", 0), ("modern", 0), ("modern", 1)])
def test_transformers_multiplies_by_the_rounded_parameters(tmp_path, family, key_heads):
  torch = pytest.importorskip("torch")
  pytest.importorskip("compressed_tensors")
  transformers = pytest.importorskip("transformers")
  config = dataclasses.replace(SETTINGS.model, family=family, num_layers=2)
  config = dataclasses.replace(config, num_kv_heads=key_heads)
  settings = dataclasses.replace(SETTINGS, model=config)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)).astype(np.int32)
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
  with one_device():
    params = jax.device_get(random_params(config))
    choice = formats.Choice(quantize="int8")
    (tmp_path / "text_tokenizer").mkdir()
    for name in text.FILES:
      (tmp_path / "text_tokenizer" / name).write_text("{}")
    run = formats.TrainedRun(Run(tmp_path, settings), stored.of_tree(params), choice)
    numbers = huggingface.write(tmp_path / "out", run)
    exact, rounded = (
      np.asarray(model_logits(config, tree, tokens, positions, np.ones_like(tokens)))
      for tree in (params, int8.rounded(params, "float32", True))
    )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(tmp_path / "out"), dtype=torch.float32
  ).eval()
  with torch.no_grad():
    found = model(torch.from_numpy(tokens).long()).logits.numpy()
  assert rounded.std() > 1
  assert np.abs(found - rounded).max() < 1e-4
  assert np.abs(found - exact).max() > 1e-2  # Rounding changes the logits noticeably.
  tensors = safetensors_numpy.load_file(tmp_path / "out" / huggingface.WEIGHTS)
  assert numbers["parameters"] > sum(x.size for x in tensors.values())
  packed = [x for name, x in tensors.items() if name.endswith("_packed")]
  assert len(packed) == 2 * (6 if family == "opt" else 7)
