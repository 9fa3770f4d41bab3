import dataclasses

from hypothesis import example, given, settings
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.params import prepare
from cm3leon_jax.export import stablehlo
from cm3leon_jax.export.serving_functions import Functions, aligned_positions, named
from cm3leon_jax.mesh import unsplit
from cm3leon_jax.positions import positions_of
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.weights import stored
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import random_params


def random_tree(config: ModelConfig) -> dict:
  with one_device():
    return jax.device_get(random_params(config, seed=2))


MODERN = {"family": "modern", "align_images": True}


@pytest.mark.parametrize(
  ("fields", "weight_dtype"),
  [
    ({}, "compute"),
    pytest.param({"query_key_norm": True}, "int8", marks=pytest.mark.slow),
    pytest.param(MODERN, "compute", marks=pytest.mark.slow),
    (MODERN | {"dtype": "bfloat16", "num_kv_heads": 1}, "int8"),
  ],
)
def test_weights_are_those_that_the_generator_prepares(run, fields, weight_dtype):
  model = dataclasses.replace(SETTINGS.model, num_layers=2, **fields)
  changed = dataclasses.replace(SETTINGS, model=model)
  tree, tokenizer = random_tree(model), ImageTokenizer.load(run / "vqgan")
  with one_device():
    prepared = prepare(tree, config=model, vocab=VOCAB, dtype=weight_dtype)
  prepared.model.pop("head", None)
  expected = named({"decoder": prepared, "image_tokenizer": tokenizer.params})
  with unsplit():
    arguments = (stored.of_tree(tree), changed, tokenizer, weight_dtype)
    tensors = stablehlo.weight_tensors(stablehlo.weight_types(*arguments), *arguments)
  assert [x.name for x in tensors] == list(expected)
  for tensor in tensors:
    found, wanted = tensor.make(), np.asarray(expected[tensor.name])
    assert (tensor.shape, tensor.dtype) == (wanted.shape, str(wanted.dtype))
    assert tensor.bytes == wanted.nbytes
    np.testing.assert_array_equal(found.astype(wanted.dtype), wanted)


def test_aligned_int8_decoders_with_neighbors_draw_as_the_generator(run):
  """Calls the functions without exporting them; positions are aligned with images."""
  sampling = dataclasses.replace(SETTINGS.sampling, guidance_schedule="linear")
  model = dataclasses.replace(SETTINGS.model, **MODERN)
  changed = dataclasses.replace(SETTINGS, model=model, sampling=sampling)
  tokenizer, tree = ImageTokenizer.load(run / "vqgan"), random_tree(model)
  neighbor = ([90, 91], VOCAB.image_ids(np.arange(16)))
  requests = [request.text_to_image(VOCAB, 16, [80], [neighbor], keep_neighbors=True)]
  with one_device():
    config = GeneratorConfig.of(changed, weight_dtype="int8", image_head=False)
    (result,) = Generator(tree, config).generate(requests, [9])
  with unsplit():
    arguments = (stored.of_tree(tree), changed, tokenizer, "int8")
    types = stablehlo.weight_types(*arguments)
    functions = Functions(model, VOCAB, sampling, tokenizer, types)
    tensors = stablehlo.weight_tensors(types, *arguments)
    weights = {x.name: jnp.asarray(x.make(), x.dtype) for x in tensors}
    prompts, unconditional = (
      np.pad(stream, (32 - len(stream), 0)).astype(np.int32)[None] for stream in requests[0].streams
    )
    drawn = jax.jit(functions.generate_image)(
      weights,
      prompts=prompts,
      unconditional=unconditional,
      seeds=np.uint32([9]),
      guidance=np.float32([sampling.guidance]),
      temperature=np.float32([sampling.temperature]),
      top_k=np.int32([sampling.top_k]),
      top_p=np.float32([sampling.top_p]),
    )
  np.testing.assert_array_equal(drawn["tokens"][0], result.tokens[:16])
  np.testing.assert_allclose(drawn["log_probs"][0], result.log_probs[:16], atol=1e-4)


@jax.jit
def both_positions(tokens):
  return [aligned_positions(tokens, VOCAB, align) for align in (False, True)]


SYMBOLS = [VOCAB.eos, VOCAB.brk, VOCAB.mask(0), 99, int(VOCAB.image_ids(7))]


@given(
  st.lists(st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=24), min_size=4, max_size=4)
)
@example([[1, 99, 3, 519, 519, 3, 99, 3, 519, 519, 1], [99], [519, 3, 519], [519, 3, 3, 99, 519]])
@settings(max_examples=200)
def test_positions_are_those_of_training(rows):
  padded = np.stack([np.pad(row, (24 - len(row), 0)) for row in rows]).astype(np.int32)
  for align, found in zip((False, True), both_positions(padded)):
    for row, positions in zip(rows, np.asarray(found), strict=True):
      expected = positions_of(row, VOCAB, align)
      np.testing.assert_array_equal(positions, np.pad(expected, (24 - len(row), 0)))
