import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import huggingface
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import layouts, placed
from cm3leon_jax.weights.stored_tensors import StoredTensors
from tests.models.tiny import random_params
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=56)
TOLERANCE = 2e-5  # Tolerance in fp32, for logits of about 10.


def config(family, **fields):
  sizes = {"num_layers": 3, "width": 48, "num_heads": 4, "mlp_width": 96, "max_positions": 40}
  return ModelConfig(family, vocab_size=320, dtype="float32", **{**sizes, **fields})


@pytest.fixture(
  params=["opt", "modern as Qwen3-0.6B", pytest.param("modern", marks=pytest.mark.slow)]
)
def exported(request, tmp_path):
  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    published = {}
    if request.param.endswith("B"):
      published = {"num_kv_heads": 2, "head_size": 24, "rope_base": 1e6}
    model_config = config(request.param.split()[0], **published)
    params = random_params(model_config)
    summary = huggingface.export(tmp_path, params, model_config, VOCAB, None)
    yield tmp_path, params, model_config, summary


def test_parameters_and_config_are_read_back(exported):
  folder, params, model_config, _ = exported
  found = placed.load(StoredTensors(folder), model_config)
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))
  described = layouts.config_of(read_json(folder / "config.json"))
  assert described["vocab"] == dataclasses.asdict(VOCAB)
  fields = dataclasses.asdict(model_config)
  assert described["model"].items() <= fields.items()
  assert "position_ids" not in read_json(folder / "config.json")["cm3leon"]
  names = {"family", "align_images", "vocab_size", "width", "mlp_width", "num_heads", "head_size"}
  assert described["model"].keys() >= names


def test_generation_stops_at_the_end_of_a_document_and_of_an_infill(exported):
  """Given a forced next token, `generate` stops after </s> and <eoss>, but not after <break>."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = str(exported[0])
  config = transformers.GenerationConfig.from_pretrained(folder)
  assert config.eos_token_id == [VOCAB.eos, VOCAB.eoss]
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  prompt = torch.tensor([[VOCAB.eos, 9, 10]])
  for token, generated in ((VOCAB.eos, 1), (VOCAB.eoss, 1), (VOCAB.brk, 4)):
    bias = {"sequence_bias": {(token,): 1e4}}
    found = model.generate(
      prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4, **bias
    )
    assert found[0, 3:].tolist() == [token] * generated


@pytest.mark.parametrize("fields", [{"head_size": 24}, {"query_key_norm": True}])
def test_head_sizes_and_query_key_norm_of_opt_cannot_be_exported(tmp_path, fields):
  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    model_config = config("opt", **fields)
    with refused(UserError, "config.model."):
      huggingface.export(tmp_path, random_params(model_config), model_config, VOCAB, None)
