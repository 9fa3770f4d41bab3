import dataclasses
import importlib.resources

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.export import image_tokenizer
from cm3leon_jax.export.serving_functions import Functions, named
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.models import nnx_params
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers import published
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.generation.run import SETTINGS, vqgan_params
from tests.refusals import refused

K = SETTINGS.vocab.image_size


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  ImageTokenizer(SETTINGS.vqgan, K, vqgan_params(SETTINGS), batch_size=2).save(root / "vqgan")
  return root


def test_the_folder_has_weights_config_and_script(workdir, tmp_path):
  about = image_tokenizer.write(tmp_path, Run(workdir, SETTINGS))
  folder = epath.Path(tmp_path) / "image_tokenizer"
  names = {"config.json", "decode_image.py", "params.safetensors"}
  assert {path.name for path in folder.iterdir()} == names
  source = importlib.resources.files("cm3leon_jax.export").joinpath("decode_image.py")
  assert (folder / "decode_image.py").read_text() == source.read_text()
  weights = (folder / "params.safetensors").read_bytes()
  assert weights == (workdir / "vqgan" / "params.safetensors").read_bytes()
  described = read_json(folder / "config.json")
  assert described["token_offset"] == SETTINGS.vocab.text_size
  sizes = {"resolution": 8, "image_tokens": 16, "num_codes": K, "bytes": len(weights)}
  sizes |= {"family": "", "code_dim": 4}
  assert about == {"image_tokenizer": sizes}


def test_this_package_reads_it_and_encodes_with_it(workdir, tmp_path):
  image_tokenizer.write(tmp_path, Run(workdir, SETTINGS))
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
  found = ImageTokenizer.load(tmp_path / "image_tokenizer").encode(images)
  np.testing.assert_array_equal(found, ImageTokenizer.load(workdir / "vqgan").encode(images))


def test_a_network_that_the_script_does_not_compute_is_refused(workdir, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(torch.nn.functional, "silu", torch.relu)
  with refused(UserError, "decode_image.py"):
    image_tokenizer.write(tmp_path, Run(workdir, SETTINGS))
  assert not (tmp_path / "image_tokenizer").exists()


OTHERS = [pytest.param(x, marks=pytest.mark.slow) for x in published.FAMILIES if x != "janus"]


@pytest.mark.parametrize("family", ["janus", *OTHERS])
def test_a_published_tokenizer_is_copied_and_served(tmp_path, family):
  """A StableHLO export, whose batch size is a symbol, has its codes and images."""
  sizes = {"widths": (8, 8), "groups": 2, "latent_channels": 4, "code_dim": 4, "resolution": 16}
  config = dataclasses.replace(published.FAMILIES[family], **sizes)
  rng = np.random.default_rng(0)
  expected = nnx_params.to_dict(published.structure(config, K)[1])
  params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), expected)
  ImageTokenizer(config, K, params).save(tmp_path / "run" / "vqgan")
  about = image_tokenizer.write(tmp_path / "export", Run(tmp_path / "run", SETTINGS))[
    "image_tokenizer"
  ]
  assert (about["family"], about["image_tokens"], about["num_codes"]) == (family, 8**2, K)
  folder = tmp_path / "export" / "image_tokenizer"
  assert {path.name for path in folder.iterdir()} == {"config.json", "params.safetensors"}
  assert about["bytes"] == (folder / "params.safetensors").stat().st_size
  found = ImageTokenizer.load(folder)
  assert (found.config, found.num_codes) == (config, K)
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  images = rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
  codes, types = found.encode(images), {"image_tokenizer": expected}
  functions = Functions(SETTINGS.model, SETTINGS.vocab, SETTINGS.sampling, found, types)
  tokens = SETTINGS.vocab.image_ids(codes).astype(np.int32)
  weights, (b,) = named({"image_tokenizer": params}), jax.export.symbolic_shape("b")
  for function, name, given, result in (
    (functions.encode_image, "images", images, tokens),
    (functions.decode_image, "tokens", tokens, found.decode(codes)),
  ):
    argument = jax.ShapeDtypeStruct((b, *given.shape[1:]), given.dtype)
    served = jax.export.export(jax.jit(function))(named(types), **{name: argument})
    np.testing.assert_array_equal(served.call(weights, **{name: given}), result)
