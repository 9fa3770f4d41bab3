import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.tokenizers import published, published_files
from tests.refusals import refused

NUM_CODES = 12
SIZES = {"widths": (4, 8), "latent_channels": 3, "code_dim": 2, "groups": 4, "blocks": 1}
DIFFUSERS = {
  "_class_name": "VQModel",
  "block_out_channels": [4, 8],
  "layers_per_block": 1,
  "latent_channels": 3,
  "vq_embed_dim": 2,
  "norm_num_groups": 4,
  "mid_block_add_attention": False,
}


@pytest.fixture(autouse=True)
def small_families(monkeypatch):
  """Replaces all families by small ones, with few narrow levels and one code per 2 x 2 pixels."""
  for name, config in published.FAMILIES.items():
    config = dataclasses.replace(config, **SIZES)
    monkeypatch.setitem(published_files.FAMILIES, name, config)


def some_tensors(family, **changed) -> dict[str, np.ndarray]:
  shapes = published_files.tensor_shapes(published_files.FAMILIES[family], NUM_CODES)
  rng = np.random.default_rng(0)
  made = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} | changed
  return {name: x for name, x in made.items() if x is not None}


def assert_read(found, tensors):
  tokenizer = found.tokenizer
  expected = published_files.from_tensors(tensors, tokenizer.config, NUM_CODES)
  jax.tree.map(np.testing.assert_array_equal, tokenizer.params, expected)
  assert {x.dtype.name for x in jax.tree.leaves(tokenizer.params)} == {"float32"}
  assert found.num_tensors == len(tensors)
  assert found.num_parameters == sum(x.size for x in tensors.values())


def test_tensors_are_read_bit_for_bit_at_their_places(tmp_path):
  tensors = some_tensors("chameleon")
  save_file(tensors, tmp_path / "any.safetensors")
  for source in (tmp_path, tmp_path / "any.safetensors"):
    found = published_files.read(source, "chameleon")
    assert_read(found, tensors)
    assert (found.files, found.num_left) == ((tmp_path / "any.safetensors",), 0)
    assert found.tokenizer.num_codes == NUM_CODES
  kernel = tensors["decoder.up.1.block.0.conv1.weight"]
  params = found.tokenizer.params["decoder"]["up"]["1"]["block"]["0"]
  np.testing.assert_array_equal(params["conv1"]["kernel"], kernel.transpose(2, 3, 1, 0))


def test_a_whole_chameleon_in_several_files_of_half_precision(tmp_path):
  """Other networks, such as those of training, are left out."""
  tensors = {k: x.astype("bfloat16") for k, x in some_tensors("chameleon").items()}
  prefixed = {f"model.vqmodel.{name}": x for name, x in tensors.items()}
  names, none = list(prefixed), np.zeros((2, 2), np.float32)
  others = {"model.layers.0.mlp.up_proj.weight": none, "model.vqmodel.loss.main.0.weight": none}
  parts = [
    {name: prefixed[name] for name in names[:9]} | others,
    {name: prefixed[name] for name in names[9:]},
    {"lm_head.weight": none},
  ]
  index = {}
  for i, part in enumerate(parts):
    save_file(part, tmp_path / f"model-{i}.safetensors")
    index |= dict.fromkeys(part, f"model-{i}.safetensors")
  write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index})
  found = published_files.read(tmp_path, "chameleon")
  assert_read(found, tensors)
  assert [path.name for path in found.files] == ["model-0.safetensors", "model-1.safetensors"]
  assert found.num_left == 3
  (tmp_path / "model-1.safetensors").unlink()
  with refused(UserError, "model-1.safetensors"):
    published_files.read(tmp_path, "chameleon")


def test_a_folder_of_amused_and_its_sizes(tmp_path):
  """Ignores weights in another precision in the same folder."""
  config = dataclasses.replace(published_files.FAMILIES["amused"], widths=(8, 8, 4), groups=2)
  shapes = published_files.tensor_shapes(config, NUM_CODES)
  tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
  folder = tmp_path / "vqvae"
  folder.mkdir()
  save_file({}, folder / "diffusion_pytorch_model.fp16.safetensors")
  save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
  sizes = {"block_out_channels": [8, 8, 4], "norm_num_groups": 2}
  (folder / "config.json").write_text(json.dumps(DIFFUSERS | sizes))
  for source in (tmp_path, folder, folder / "diffusion_pytorch_model.safetensors"):
    found = published_files.read(source, "amused")
    assert_read(found, tensors)
    assert found.tokenizer.config == config


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("_class_name", "AutoencoderKL"),
    ("act_fn", "relu"),
    ("norm_type", "spatial"),
    ("mid_block_add_attention", True),
    ("block_out_channels", [6]),
    ("layers_per_block", "2"),
  ],
)
def test_another_network_of_diffusers_is_refused(tmp_path, field, value):
  save_file(some_tensors("amused"), tmp_path / "diffusion_pytorch_model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS | {field: value}))
  with refused(UserError, f"{tmp_path / 'config.json'}"):
    published_files.read(tmp_path, "amused")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("quant_conv.bias", None),
    ("extra", np.zeros(1)),
    ("quant_conv.bias", np.zeros(3, np.float32)),
    ("quant_conv.bias", np.array([1, np.nan])),
    ("quantize.embedding.weight", None),
    ("quantize.embedding.weight", np.zeros(())),
  ],
)
def test_wrong_tensors_are_named(tmp_path, name, value):
  for family, given in (("chameleon", "chameleon"), ("janus", None)):
    save_file(some_tensors(family, **{name: value}), tmp_path / "a.safetensors")
    with refused(UserError, str(tmp_path), f"'{name}'"):
      published_files.read(tmp_path, given)


@pytest.mark.parametrize(
  ("family", "prefix"),
  [
    ("amused", ""),
    ("chameleon", "model.vqmodel."),
    ("llamagen", ""),
    ("llamagen", "gen_vision_model."),
    ("janus", "model.vqmodel."),
  ],
)
def test_the_family_is_found_in_its_file_and_in_a_whole_model(tmp_path, family, prefix):
  """Tensors of the language model, and what only training needs, are left."""
  tensors = some_tensors(family)
  left = {f"{prefix}quantize.codebook_used": np.zeros(3, np.float32)}
  left |= {"language_model.norm.weight": np.ones(3, np.float32)} if prefix else {}
  save_file({prefix + k: x for k, x in tensors.items()} | left, tmp_path / "model.safetensors")
  found = published_files.read(tmp_path)
  assert (found.tokenizer.config.family, found.num_left) == (family, len(left))
  assert_read(found, tensors)


def test_weights_of_another_network_are_refused(tmp_path):
  tensors = some_tensors("chameleon")
  no_decoder = {k: x for k, x in tensors.items() if not k.startswith("decoder.")}
  for found, family, fact in (
    (tensors, "amused", "another --family"),
    (tensors, "janus", "another --family"),
    (some_tensors("janus"), "chameleon", "another --family"),
    (some_tensors("llamagen"), "janus", "another --family"),
    ({"model.norm.weight": np.zeros(2, np.float32)}, "chameleon", "no tensor"),
    (no_decoder, "chameleon", "contains no decoder"),
  ):
    save_file(found, tmp_path / "a.safetensors")
    with refused(UserError, str(tmp_path), f"--family={family}", fact):
      published_files.read(tmp_path, family)
  save_file({"norm.weight": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
  with refused(UserError, str(tmp_path), "no tensors of a supported image tokenizer (amused, "):
    published_files.read(tmp_path)


class Opened:
  """Object that records when it is unpickled."""

  opened = False

  def __reduce__(self):
    return (setattr, (Opened, "opened", True))


@pytest.mark.parametrize("name", ["last.ckpt", "vqgan.pt", "a.bin", "without_suffix"])
def test_a_pickle_is_never_opened(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Opened()))
  with refused(UserError, str(tmp_path / name), "pickle"):
    published_files.read(tmp_path / name, "chameleon")
  if name != "without_suffix":
    with refused(UserError, str(tmp_path / name), "pickle"):
      published_files.read(tmp_path, "chameleon")
  assert not Opened.opened


def test_other_sources_are_refused(tmp_path):
  for source in (tmp_path / "nothing", "gs://bucket/weights", tmp_path):
    with refused(UserError, str(source)):
      published_files.read(source, "amused")
  for name in ("a", "b"):
    (tmp_path / f"{name}.safetensors").write_bytes(b"PK\x03\x04 not what its name says")
  with refused(UserError, str(tmp_path), "2 .safetensors files"):
    published_files.read(tmp_path, "amused")
  with refused(UserError, str(tmp_path / "a.safetensors"), "not a whole safetensors file"):
    published_files.read(tmp_path / "a.safetensors", "amused")


def vqgan_config(resolution, downsample):
  one = {"stem": downsample, "multipliers": (1,), "encoder_blocks": (0,), "decoder_blocks": (0,)}
  return VQGANConfig(resolution=resolution, downsample=downsample, **one)


@pytest.fixture
def tokenizer(tmp_path):
  save_file(some_tensors("amused"), tmp_path / "a.safetensors")
  return published_files.read(tmp_path, "amused").tokenizer


def test_the_grid_and_the_codebook_must_be_those_of_the_config(tokenizer):
  for resolution in (256, 512):
    fitted = published_files.fit(tokenizer, NUM_CODES, vqgan_config(resolution, 2))
    assert fitted.config == dataclasses.replace(tokenizer.config, resolution=resolution)
    assert fitted.batch_size == 2**20 // resolution**2
  for codes, resolution, downsample, flag in (
    (64, 256, 2, "--config.vocab.image_size=12"),
    (NUM_CODES, 256, 4, "--config.vqgan.downsample=2"),
    (NUM_CODES, 128, 2, "--config.vqgan.resolution=256"),
  ):
    with pytest.raises(UserError, match=f"add the flags {flag}$"):
      published_files.fit(tokenizer, codes, vqgan_config(resolution, downsample))
