"""Tests that the peer decoders sample the same tokens as the exported model without a cache."""

import dataclasses

import numpy as np
import pytest

from benchmarks.speed import decode_model
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.request import unconditional_prompt
from cm3leon_jax.export import huggingface
from cm3leon_jax.vocab import VocabLayout

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=56)
SIZES = {"num_layers": 3, "width": 48, "num_heads": 4, "mlp_width": 96, "max_positions": 40}
CONFIG = ModelConfig(vocab_size=320, dtype="float32", **SIZES)
GREEDY = SamplingConfig(top_k=1)
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def peers():
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from benchmarks.speed import decode_peers

  # With several threads, waiting threads spin, and tests take seconds instead of milliseconds.
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield decode_peers
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(peers, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported")
  params = decode_model.random_params(CONFIG, std=0.2)
  huggingface.export(folder, params, CONFIG, VOCAB, None)
  return folder, peers.opt_arrays(params)


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(8, 264, n).astype(np.int32) for n in (9, 2, 5)]


def uncached(folder, prompt, guidance):
  """Decodes greedily without a cache; returns ids [I] and the smallest gap of the top 2 logits."""
  import torch
  import transformers

  model = transformers.OPTForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
  found, leads = [], []
  for _ in range(NEW_TOKENS):
    with torch.inference_mode():
      c, u = (
        model(torch.tensor([[*p, *found]])).logits[0, -1]
        for p in (prompt, unconditional_prompt(VOCAB))
      )
    top = torch.topk(u + guidance * (c - u), 2)
    found.append(int(top.indices[0]))
    leads.append(float(top.values[0] - top.values[1]))
  return found, min(leads)


@pytest.mark.slow
@pytest.mark.parametrize("product", ["linear", "transposed", "packed"])
def test_loop_equals_an_uncached_model(peers, exported, product):
  import torch

  if product == "packed" and not torch.backends.mkldnn.is_available():
    pytest.skip("torch without oneDNN")
  folder, tensors = exported
  found = peers.torch_loop(tensors, CONFIG, VOCAB, NEW_TOKENS, GREEDY, product)(prompts(), 0)
  expected, leads = zip(*(uncached(folder, p, GREEDY.guidance) for p in prompts()))
  assert min(leads) > 1e-3
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(found)) > NEW_TOKENS
  # Negative control: guidance matters.
  without = dataclasses.replace(GREEDY, guidance=1.0)
  loop = peers.torch_loop(tensors, CONFIG, VOCAB, NEW_TOKENS, without, product)
  assert (loop(prompts(), 0) != found).any(1).all()
