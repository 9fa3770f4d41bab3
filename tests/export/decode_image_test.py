"""Tests that an export's script decodes and encodes images as the image tokenizer does."""

import json
import subprocess
import sys
from typing import get_args

import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.tokenizers import Quantizer, VQGANConfig
from cm3leon_jax.export import image_tokenizer
from cm3leon_jax.run.run import Run
from cm3leon_jax.run.source import IMAGES
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.generation.run import SETTINGS
from tests.refusals import refused

torch = pytest.importorskip("torch")
from cm3leon_jax.export import decode_image  # noqa: E402

K = 30  # FSQ with 6 x 5 levels, an even and an odd number, has 30 codes.
TOLERANCE = 1e-4  # Tolerance for fp32 pixels in [-1, 1].
PLAIN = {"resolution": 16, "downsample": 4, "width": 8, "code_dim": 4, "multipliers": (1, 2)}
PLAIN |= {"encoder_blocks": (0, 0), "decoder_blocks": (0, 1)}
VARIANTS = {
  "three levels": PLAIN
  | {"stem": 1, "multipliers": (1, 2, 3), "encoder_blocks": (1, 2, 0), "decoder_blocks": (1, 0, 2)},
  "local codes": PLAIN
  | {"stem": 4, "multipliers": (1,), "encoder_blocks": (1,), "decoder_blocks": (2,)}
  | {"local_codes": True},
}  # fmt: skip
VARIANTS["quantizer fsq"] = PLAIN | {"quantizer": "fsq", "code_dim": 2}
assert {f"quantizer {name}" for name in get_args(Quantizer) if name} <= {*VARIANTS}


def random_tokenizer(fields: dict) -> ImageTokenizer:
  """Returns a tokenizer whose parameters, biases included, are random."""
  config = VQGANConfig(**fields, adversarial_weight=0.0)
  params = jax.eval_shape(lambda: vqgan.init_params(config, K, jax.random.key(0)))
  rng = np.random.default_rng(0)

  def make(x):
    std = {1: 0.1, 2: 1.0, 4: int(np.prod(x.shape[:-1])) ** -0.5}[len(x.shape)]
    return rng.normal(0, std, x.shape).astype(np.float32)

  return ImageTokenizer(config, K, jax.tree.map(make, params), batch_size=3)


def pixels_of(tokenizer: ImageTokenizer, codes):
  side = tokenizer.config.resolution // tokenizer.config.downsample

  @jax.jit
  def run(params, codes):
    model = vqgan.bind(tokenizer.config, K, params)
    return model.decoder(model.codebook(codes.reshape(-1, side, side)))

  return np.asarray(run(tokenizer.params, codes))


def save(tokenizer: ImageTokenizer, folder):
  """Saves a tokenizer as vqgan/ of a run and as an export; returns the folder of the export."""
  tokenizer.save(folder / "run" / "vqgan")
  image_tokenizer.write(folder / "export", Run(folder / "run", SETTINGS))
  return folder / "export" / IMAGES


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request, tmp_path_factory):
  """Returns a tokenizer, its export's folder, codes of three images, and their pixels by JAX."""
  tokenizer = random_tokenizer(VARIANTS[request.param])
  codes = np.random.default_rng(1).integers(0, K, (3, tokenizer.config.image_tokens))
  folder = save(tokenizer, tmp_path_factory.mktemp("variant"))
  return tokenizer, folder, codes, pixels_of(tokenizer, codes)


def test_pixels_are_those_of_the_image_tokenizer(variant):
  tokenizer, folder, codes, expected = variant
  loaded = decode_image.load(folder)
  pixels = np.array([loaded.decode(torch.tensor(row)).numpy() for row in codes])
  assert expected.std() > 0.2
  assert np.abs(pixels - expected).max() < TOLERANCE
  images = decode_image.decode(codes, folder)
  assert images.dtype == np.uint8
  levels = (expected + 1) * 127.5
  tie = np.abs(levels - np.floor(levels) - 0.5) < 127.5 * TOLERANCE
  assert tie.mean() < 0.1
  np.testing.assert_array_equal(images[~tie], tokenizer.decode(codes)[~tie])


def test_images_are_encoded_as_by_the_image_tokenizer(variant):
  tokenizer, folder, _, _ = variant
  side = tokenizer.config.resolution
  images = np.random.default_rng(3).integers(0, 256, (3, side, side, 3)).astype(np.uint8)
  codes, expected = decode_image.encode(images, folder), tokenizer.encode(images)
  assert len(np.unique(expected)) > 4
  for image, found, right in zip(images, codes, expected):
    near = decode_image.load(folder).scores(torch.tensor(image) / 127.5 - 1).numpy()
    places = np.arange(len(right))
    tie = near[places, found] - near[places, right] < 1e-5  # Equally near codes.
    np.testing.assert_array_equal(found[~tie], right[~tie])
    assert (found == right).mean() > 0.9
  with refused(ValueError, "images are"):
    decode_image.encode(images[:, :, 1:], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save(random_tokenizer(PLAIN), tmp_path_factory.mktemp("plain"))


def test_codes_are_found_in_ids(folder):
  offset = SETTINGS.vocab.text_size
  first, second = np.arange(16), np.arange(16)[::-1]
  ids = [1, 9, 3, *(first + offset), 3, *(second + offset), 1]
  np.testing.assert_array_equal(decode_image.codes_of(ids, folder), [first, second])
  with refused(ValueError, "runs of"):
    decode_image.codes_of([*ids[:18], *ids[19:]], folder)
  with refused(ValueError, "runs of"):
    decode_image.codes_of([1, 9, 3], folder)
  with refused(ValueError, "ids are"):
    decode_image.codes_of([ids], folder)


@pytest.mark.parametrize(
  "codes",
  [
    np.zeros((1, 15), int),
    np.zeros(16, int),
    np.zeros((1, 16)),
    np.where(np.arange(32) == 18, K, 0).reshape(2, 16),
    np.full((1, 16), -1),
  ],
)
def test_other_codes_are_refused(folder, codes):
  with refused(ValueError, "of image"):
    decode_image.decode(codes, folder)


def run_script(folder, *arguments):
  """Runs the script in a new process without packages that users may lack."""
  absent = "jax", "flax", "cm3leon_jax"
  code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); del sys.argv[0]; "
  code += "sys.path.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
  command = [sys.executable, "-c", code, str(folder / "decode_image.py"), *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True)


def test_the_script_writes_images_without_this_package(folder, tmp_path):
  codes = np.random.default_rng(2).integers(0, K, (2, 16))
  expected = decode_image.decode(codes, folder)
  source, target = tmp_path / "codes.json", tmp_path / "image.png"
  source.write_text(json.dumps(codes[0].tolist()))
  done = run_script(folder, source, target)
  assert (done.returncode, done.stdout, done.stderr) == (0, f"{target}\n", "")
  np.testing.assert_array_equal(np.asarray(Image.open(target)), expected[0])
  ids = [1, *(codes[0] + SETTINGS.vocab.text_size).tolist(), 3]
  ids += [*(codes[1] + SETTINGS.vocab.text_size).tolist(), 1]
  source.write_text(json.dumps(ids))
  done = run_script(folder, "--ids", source, target)
  names = [tmp_path / "image_0.png", tmp_path / "image_1.png"]
  assert done.stdout.split() == list(map(str, names))
  for name, image in zip(names, expected):
    np.testing.assert_array_equal(np.asarray(Image.open(name)), image)
