import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.tokenizers import published, published_files
from cm3leon_jax.tokenizers.config import VQGANConfig
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.refusals import refused
from tests.tokenizers.vqgan_test import CONFIG as TRAINED

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
  kept = published_files.to_tensors(found.tokenizer)
  assert kept.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(kept[name], np.asarray(x, np.float32))
  assert found.num_tensors == len(tensors)
  assert found.num_parameters == sum(x.size for x in tensors.values())


@pytest.mark.parametrize("family", published.FAMILIES)
def test_tensors_are_read_bit_for_bit(family, tmp_path):
  tensors = some_tensors(family)
  save_file(tensors, tmp_path / "any.safetensors")
  for source in (tmp_path, tmp_path / "any.safetensors"):
    found = published_files.read(source, family)
    assert_read(found, tensors)
    assert (found.files, found.num_left) == ((tmp_path / "any.safetensors",), 0)
    assert found.tokenizer.num_codes == NUM_CODES


def test_half_precision_becomes_fp32(tmp_path):
  tensors = {k: x.astype("bfloat16") for k, x in some_tensors("chameleon").items()}
  save_file(tensors, tmp_path / "model.safetensors")
  found = published_files.read(tmp_path, "chameleon")
  assert_read(found, tensors)
  assert {x.dtype.name for x in jax.tree.leaves(found.tokenizer.params)} == {"float32"}


def test_a_whole_chameleon_in_several_files(tmp_path):
  tensors = some_tensors("chameleon")
  prefixed = {f"model.vqmodel.{name}": x for name, x in tensors.items()}
  names = list(prefixed)
  decoder = {"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}
  parts = [
    {name: prefixed[name] for name in names[:9]} | decoder,
    {name: prefixed[name] for name in names[9:]},
    {"lm_head.weight": np.zeros((2, 2), np.float32)},
  ]
  index = {}
  for i, part in enumerate(parts):
    save_file(part, tmp_path / f"model-{i}.safetensors")
    index |= dict.fromkeys(part, f"model-{i}.safetensors")
  path = tmp_path / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": index}))
  found = published_files.read(tmp_path, "chameleon")
  assert_read(found, tensors)
  assert [path.name for path in found.files] == ["model-0.safetensors", "model-1.safetensors"]
  assert found.num_left == 2
  (tmp_path / "model-1.safetensors").unlink()
  with refused(UserError):
    published_files.read(tmp_path, "chameleon")


def test_networks_of_training_are_left_out(tmp_path):
  tensors = some_tensors("taming_gumbel_f8")
  loss = {"loss.discriminator.main.0.weight": np.zeros((2, 2), np.float32)}
  save_file(tensors | loss, tmp_path / "last.safetensors")
  found = published_files.read(tmp_path / "last.safetensors", "taming_gumbel_f8")
  assert_read(found, tensors)
  assert found.num_left == 1


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
    ("block_out_channels", None),
    ("block_out_channels", [6]),
    ("layers_per_block", "2"),
  ],
)
def test_another_network_of_diffusers_is_refused(tmp_path, field, value):
  save_file(some_tensors("amused"), tmp_path / "diffusion_pytorch_model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS | {field: value}))
  with refused(UserError):
    published_files.read(tmp_path, "amused")


@pytest.mark.parametrize(
  "changed",
  [
    {"quant_conv.bias": None},
    {"extra": np.zeros(1)},
    {"quant_conv.bias": np.zeros(3, np.float32)},
    {"quant_conv.bias": np.array([1, np.nan])},
    {"quantize.embedding.weight": None},
    {"quantize.embedding.weight": np.zeros(())},
  ],
)
def test_wrong_tensors_are_named(tmp_path, changed):
  save_file(some_tensors("chameleon", **changed), tmp_path / "a.safetensors")
  with refused(UserError):
    published_files.read(tmp_path, "chameleon")


def test_weights_of_another_family_are_named(tmp_path):
  save_file(some_tensors("taming_gumbel_f8"), tmp_path / "a.safetensors")
  for family in ("amused", "chameleon"):
    with refused(UserError):
      published_files.read(tmp_path, family)


def test_a_chameleon_without_decoder_is_refused_with_where_it_is(tmp_path):
  tensors = some_tensors("chameleon")
  encoder = {f"model.vqmodel.{k}": x for k, x in tensors.items() if not k.startswith("decoder.")}
  save_file(encoder, tmp_path / "model.safetensors")
  with refused(UserError):
    published_files.read(tmp_path, "chameleon")


@pytest.mark.parametrize(
  "config",
  [
    {"model_type": "qwen3"},
    {"model_type": "llama"},
    {"vqgan": {}, "num_codes": 8},
    {"published": {}, "num_codes": 8},
  ],
)
@pytest.mark.parametrize("family", published.FAMILIES)
def test_a_folder_of_another_model_is_refused_by_what_it_holds(config, family, tmp_path):
  save_file({"model.norm.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(config))
  with refused(UserError):
    published_files.read(tmp_path, family)


def test_a_whole_chameleon_is_no_other_model(tmp_path):
  """The config.json of a whole Chameleon has the same model_type as its decoder alone."""
  tensors = {f"model.vqmodel.{name}": x for name, x in some_tensors("chameleon").items()}
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
  assert published_files.read(tmp_path, "chameleon").num_tensors == len(tensors)


class Opened:
  """Object that records when it is unpickled."""

  opened = False

  def __reduce__(self):
    return (setattr, (Opened, "opened", True))


@pytest.mark.parametrize("name", ["last.ckpt", "vqgan.pt", "a.bin", "without_suffix"])
def test_a_pickle_is_never_opened(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Opened()))
  with refused(UserError):
    published_files.read(tmp_path / name, "taming_gumbel_f8")
  if name != "without_suffix":
    with refused(UserError):
      published_files.read(tmp_path, "taming_gumbel_f8")
  assert not Opened.opened


def test_other_sources_are_refused(tmp_path):
  for source in (tmp_path / "nothing", "gs://bucket/weights"):
    with refused(UserError):
      published_files.read(source, "amused")
  with refused(UserError):
    published_files.read(tmp_path, "amused")
  for name in ("a", "b"):
    (tmp_path / f"{name}.safetensors").write_bytes(b"PK\x03\x04 not what its name says")
  with refused(UserError):
    published_files.read(tmp_path, "amused")
  with refused(UserError):
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
  with refused(UserError):
    published_files.fit(tokenizer, 64, vqgan_config(256, 2))
  for resolution, downsample in ((256, 4), (128, 2)):
    with refused(UserError):
      published_files.fit(tokenizer, NUM_CODES, vqgan_config(resolution, downsample))


def test_the_colors_of_codes_must_be_those_of_the_config(tokenizer):
  plain = vqgan_config(256, 2)
  pairs = dataclasses.replace(plain, quantizer="shape_color", local_codes=True, code_dim=16)
  ours = {config: ImageTokenizer(config, 64, {}) for config in (plain, pairs)}
  for config, ok in ours.items():
    assert published_files.fit(ok, 64, config) is ok
  with pytest.raises(UserError, match=r"quantizer=shape_color, .*num_colors=8"):
    published_files.fit(ours[pairs], 64, plain)
  for one, codes in ((ours[plain], 64), (tokenizer, NUM_CODES)):
    with pytest.raises(UserError, match=r"set config.vqgan.quantizer=\.$"):
      published_files.fit(one, codes, pairs)


def test_diffusers_reads_what_is_written(tokenizer, tmp_path):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  published_files.save_diffusers(tmp_path / "out", tokenizer)
  model = diffusers.VQModel.from_pretrained(tmp_path / "out")
  tensors = published_files.to_tensors(tokenizer)
  assert model.state_dict().keys() == tensors.keys()
  for name, value in model.state_dict().items():
    np.testing.assert_array_equal(value, tensors[name])
  codes = np.random.default_rng(0).integers(0, NUM_CODES, (1, 3, 4))
  with torch.no_grad():
    flat = torch.tensor(codes).reshape(-1)
    expected = model.decode(flat, force_not_quantize=True, shape=(1, 3, 4, 2)).sample
  decoded = published.decode_pixels(tokenizer.config, NUM_CODES, tokenizer.params, codes)
  np.testing.assert_allclose(decoded, expected.permute(0, 2, 3, 1), atol=1e-4, rtol=0)
  # Importing the result again changes nothing.
  found = published_files.read(tmp_path / "out", "amused")
  assert_read(found, tensors)
  assert found.tokenizer.config == tokenizer.config
  assert read_json(tmp_path / "out" / "config.json")["force_upcast"] is True


def test_diffusers_has_no_layout_for_others(tokenizer, tmp_path):
  gumbel = dataclasses.replace(tokenizer, config=published_files.FAMILIES["taming_gumbel_f8"])
  trained = ImageTokenizer(TRAINED, NUM_CODES, {})
  for other in (gumbel, trained):
    with refused(UserError):
      published_files.save_diffusers(tmp_path / "out", other)
  assert not (tmp_path / "out").exists()
