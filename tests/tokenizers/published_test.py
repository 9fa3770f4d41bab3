import dataclasses
import math

import jax
import numpy as np
import pytest

from cm3leon_jax.tokenizers import published, published_files
from cm3leon_jax.tokenizers.published import FAMILIES, PublishedConfig
from tests.tokenizers import published_oracles
from tests.tokenizers.published_oracles import small

torch = pytest.importorskip("torch")

NUM_CODES = 48
TIE = 1e-5  # Codes whose distances or logits differ by less are both accepted.
TOLERANCE = 1e-4  # Difference of pixels.


def some_images(height: int, width: int, count: int = 2) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def load(config, num_codes, oracle) -> dict:
  tensors = {name: value.numpy() for name, value in oracle.tensors().items()}
  return published_files.from_tensors(tensors, config, num_codes)


def num_different(config, num_codes, params, oracle, images) -> int:
  """Counts codes that differ from those of the reference, ignoring ties."""
  codes = np.asarray(published.encode(config, num_codes, params, images))
  with torch.no_grad():
    pixels = published_oracles.to_pixels(images, oracle.lowest)
    expected, distances = oracle.encode(pixels).numpy(), oracle.distances(pixels).numpy()
  assert codes.shape == expected.shape
  assert codes.dtype == np.int32
  assert len(np.unique(expected)) > 5  # The codes vary.
  ours, theirs = (np.take_along_axis(distances, x[..., None], -1) for x in (codes, expected))
  return int(((codes != expected) & (ours - theirs > TIE)[..., 0]).sum())


def largest_difference(config, num_codes, params, oracle, codes) -> float:
  decoded = np.asarray(published.decode_pixels(config, num_codes, params, codes))
  with torch.no_grad():
    expected = oracle.decode(torch.tensor(codes)).numpy()
  assert decoded.shape == expected.shape
  assert decoded.dtype == np.float32
  assert expected.std() > 0.1
  return float(np.abs(decoded - expected).max())


def make(config):
  """Returns (reference model with random weights, its parameters)."""
  oracle = published_oracles.make(config, NUM_CODES)
  return oracle, load(config, NUM_CODES, oracle)


def swapped(params, side, level, first, second):
  """Swaps two layers in the first block of a level; the result is a wrong model."""
  changed = jax.tree.map(lambda x: x, params)
  block = changed[side][level]["0"]["block"]["1"]
  block[first], block[second] = block[second], block[first]
  return changed


@pytest.mark.parametrize(
  ("family", "fields"),
  [
    ("chameleon", {"level_attention": True}),
    pytest.param("amused", {}, marks=pytest.mark.slow),
    pytest.param("chameleon", {}, marks=pytest.mark.slow),
    pytest.param("llamagen", {}, marks=pytest.mark.slow),  # The network of Janus.
    ("janus", {}),
  ],
)
def test_codes_and_pixels_equal_torch(family, fields):
  """Given images that are not square, codes and pixels are equal, unless two layers are swapped.

  Negative control of Janus: its codes keep their lengths, which are unequal.
  """
  oracle, params = make(config := small(family, **fields))
  images = some_images(24, 32)
  codes = np.random.default_rng(2).integers(0, NUM_CODES, (2, 6, 8))
  encoder = swapped(params, "encoder", "down", "conv1", "conv2")
  decoder = swapped(params, "decoder", "up", "norm1", "norm2")
  if family == "janus":
    table = oracle.model.quantize.embedding.weight.detach().numpy()
    assert np.linalg.norm(table, axis=-1).std() > 0.5
    encoder = decoder = params | {"quantize": {"embedding": {"embedding": table}}}
  assert num_different(config, NUM_CODES, params, oracle, images) == 0
  assert num_different(config, NUM_CODES, encoder, oracle, images) > 5
  assert largest_difference(config, NUM_CODES, params, oracle, codes) < TOLERANCE
  assert largest_difference(config, NUM_CODES, decoder, oracle, codes) > 100 * TOLERANCE


# Published (levels, codes per image, code width) and number of parameters of each family.
PUBLISHED = {
  "amused": (16, 256, 64, 146_244_675),
  "chameleon": (16, 1_024, 256, 68_718_467),
  "llamagen": (16, 256, 8, 71_883_403),
  "janus": (16, 576, 8, 71_883_403),
}
NUM_PUBLISHED = {"amused": 8_192, "chameleon": 8_192, "llamagen": 16_384, "janus": 16_384}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_tensors_have_the_names_and_shapes_of_torch(family):
  config, count = FAMILIES[family], NUM_PUBLISHED[family]
  with torch.device("meta"):
    oracle = published_oracles.build(config, count)
  found = {name: tuple(value.shape) for name, value in oracle.tensors().items()}
  assert published_files.tensor_shapes(config, count) == found
  numbers = sum(math.prod(shape) for shape in found.values())
  assert (config.downsample, config.image_tokens, config.code_dim, numbers) == PUBLISHED[family]


NAMES = {
  "amused": {
    "encoder.down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "decoder.up_blocks.4.resnets.2.norm2.bias": (128,),
    "decoder.mid_block.resnets.1.conv1.weight": (768, 768, 3, 3),
    "quantize.embedding.weight": (8192, 64),
  },
  "chameleon": {
    "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
    "decoder.mid.attn_1.norm.weight": (512,),
    "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
    "post_quant_conv.weight": (256, 256, 1, 1),
  },
  "llamagen": {
    "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.conv_blocks.4.attn.1.q.weight": (512, 512, 1, 1),
    "decoder.mid.2.conv2.weight": (512, 512, 3, 3),
    "decoder.conv_blocks.0.res.2.conv1.weight": (512, 512, 3, 3),
    "decoder.conv_blocks.3.res.0.nin_shortcut.weight": (128, 256, 1, 1),
    "quantize.embedding.weight": (16_384, 8),
  },
  "janus": {
    "encoder.down.4.attn.1.q.weight": (512, 512, 1, 1),
    "decoder.up.3.upsample.conv.weight": (128, 128, 3, 3),
    "decoder.up.4.block.2.conv2.weight": (128, 128, 3, 3),
  },
}


LARGE = [pytest.param(family, marks=pytest.mark.slow) for family in ("llamagen", "janus")]


@pytest.mark.parametrize("family", ["amused", "chameleon", *LARGE])
def test_published_names_literals(family):
  shapes = published_files.tensor_shapes(FAMILIES[family], NUM_PUBLISHED[family])
  assert {name: shapes.get(name) for name in NAMES[family]} == NAMES[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_sizes_equal_torch(family, optimized):
  config, count = FAMILIES[family], NUM_PUBLISHED[family]
  oracle = published_oracles.make(config, count)
  params = load(config, count, oracle)
  assert num_different(config, count, params, oracle, some_images(64, 96, 1)) == 0
  codes = np.random.default_rng(2).integers(0, count, (1, 4, 6))
  assert largest_difference(config, count, params, oracle, codes) < TOLERANCE


def test_impossible_sizes_are_refused():
  amused = dataclasses.asdict(FAMILIES["amused"])
  with pytest.raises(ValueError, match="it must divide all widths, but one of them is 48"):
    PublishedConfig(**amused | {"widths": (32, 48)})
  with pytest.raises(ValueError, match="resolution is 40; it must be a multiple of 16"):
    PublishedConfig(**amused | {"resolution": 40})
