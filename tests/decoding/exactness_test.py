"""Tests that greedy tokens equal those of transformers' OPT in fp64, with and without guidance."""

import jax
import numpy as np
import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.grammar import CODES, Part
from cm3leon_jax.export import huggingface
from tests.decoding.small import VOCAB, model_config, on_mesh
from tests.models.tiny import random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

POSITIONS = 1_300
PROMPTS = [[20, 21, 22], [30], [*range(40, 90)]]


class OnlyCodes(transformers.LogitsProcessor):
  """Allows only image codes, as the plan of our requests does."""

  def __call__(self, input_ids, scores):
    return scores.index_fill(1, torch.arange(VOCAB.text_size), -torch.inf)


def theirs(folder, requests, count: int, guidance: float):
  """Generates with transformers in fp64 (left padding); returns ids and log_probs [B, G]."""
  # OPT's eager attention computes its softmax in fp32, even in fp64 models.
  model = transformers.OPTForCausalLM.from_pretrained(
    str(folder), dtype=torch.float64, attn_implementation="sdpa"
  ).eval()

  def padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[VOCAB.pad] * (longest - len(r)) + r.tolist() for r in rows])
    return ids, (
      torch.arange(longest)[None] >= torch.tensor([longest - len(r) for r in rows])[:, None]
    ).long()

  (ids, mask), (negative, negative_mask) = (
    padded([r.streams[s] for r in requests]) for s in (0, -1)
  )
  guided = {"guidance_scale": guidance, "negative_prompt_ids": negative}
  guided["negative_prompt_attention_mask"] = negative_mask
  length = {"min_new_tokens": count, "max_new_tokens": count, "logits_processor": [OnlyCodes()]}
  output = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
  guided = guided if guidance != 1 else {}
  out = model.generate(ids, attention_mask=mask, **length, **output, **guided)
  tokens = out.sequences[:, ids.shape[1] :]
  scores = torch.stack(out.scores, dim=1).log_softmax(-1)
  return tokens.numpy(), scores.gather(2, tokens[..., None])[..., 0].numpy()


def ours(params, requests, guidance: float):
  sampling = SamplingConfig(top_k=1, guidance=guidance)
  config = GeneratorConfig(
    model_config(max_positions=POSITIONS, dtype="float64"), VOCAB, 6, POSITIONS, sampling
  )
  with jax.enable_x64(True):
    results = Generator(params, config).generate(requests, range(len(requests)))
  return np.stack([r.tokens for r in results]), np.stack([r.log_probs for r in results])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported")
  config, threads = model_config(max_positions=POSITIONS), torch.get_num_threads()
  torch.set_num_threads(1)  # With more threads, waiting takes longer than the computation.
  with on_mesh():
    params = random_params(config)
    huggingface.export(folder, params, config, VOCAB, None)
    yield folder, params
  torch.set_num_threads(threads)


def requests_of(count: int):
  plan = (Part(CODES, count),)
  images = [request_lib.text_to_image(VOCAB, 6, np.array(p)) for p in PROMPTS]
  return [request_lib.Request(r.streams, plan) for r in images]


def check(model, count: int, guidance: float):
  folder, params = model
  requests = requests_of(count)
  if guidance == 1:
    requests = [request_lib.Request(r.streams[:1], r.plan) for r in requests]
  ids, log_probs = ours(params, requests, guidance)
  expected, expected_log_probs = theirs(folder, requests, count, guidance)
  assert ids.shape == (len(PROMPTS), count)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(log_probs, expected_log_probs, atol=2e-6)  # `log_probs` are fp32.
  # Controls: samples differ, do not repeat one code, and change with guidance.
  assert len({tuple(row) for row in ids.tolist()}) == len(PROMPTS)
  assert min(len(set(row)) for row in ids.tolist()) > 5
  if guidance != 1:
    assert (ours(params, requests, guidance + 0.5)[0] != ids).any(axis=1).all()


@pytest.mark.parametrize(
  ("count", "guidance"),
  [(64, 3.0), *(pytest.param(1_024, x, marks=pytest.mark.slow) for x in (1.0, 3.0))],
)
def test_greedy_tokens(model, count, guidance):
  check(model, count, guidance)
