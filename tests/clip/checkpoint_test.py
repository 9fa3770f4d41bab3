import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from cm3leon_jax.clip import checkpoint as clip_checkpoint
from cm3leon_jax.clip import huggingface as hf_clip
from cm3leon_jax.errors import UserError
from tests.clip.huggingface_files import CAPTIONS, END, load, some_images, write_checkpoint
from tests.refusals import refused


def test_sharded_and_newer_files_load_the_same(folder, tmp_path):
  write_checkpoint(tmp_path, "quick_gelu", END, max_shard_size="40KB")
  assert not (tmp_path / clip_checkpoint.WEIGHTS).exists()
  transformers.AutoTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path)
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).unlink()
  one, many = load(folder), load(tmp_path)
  assert one.config == many.config
  np.testing.assert_array_equal(one.embed_images(some_images(2)), many.embed_images(some_images(2)))
  texts = [[clip.encode(caption) for caption in CAPTIONS] for clip in (one, many)]
  np.testing.assert_array_equal(one.embed_texts(texts[0]), many.embed_texts(texts[1]))
  next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
  with refused(UserError, str(tmp_path)):
    load(tmp_path)


@pytest.mark.parametrize("patch", [32, 14])
def test_published_layouts(patch, tmp_path):
  """Given the sizes of ViT-B/32 and ViT-L/14, the tensors match those of transformers."""
  torch = pytest.importorskip("torch")
  large = patch == 14
  text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} if large else {}
  vision = {"patch_size": patch}
  if large:
    vision |= {"hidden_size": 1024, "intermediate_size": 4096}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16}
  stored = transformers.CLIPConfig(
    text_config=text, vision_config=vision, projection_dim=768 if large else 512
  )
  with torch.device("meta"):
    model = transformers.CLIPModel(stored)
  stored.save_pretrained(tmp_path)
  config = clip_checkpoint.read_config(tmp_path)
  shapes = clip_checkpoint.tensor_shapes(config)
  published = {name: tuple(x.shape) for name, x in model.state_dict().items()}
  assert shapes == {name: shape for name, shape in published.items() if name != "logit_scale"}

  def typed(shapes, *axes):
    return {n: jax.ShapeDtypeStruct((*axes, *s), jnp.bfloat16) for n, s in shapes.items()}

  params = typed({name: shape for name, shape in shapes.items() if ".layers." not in name})
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    params[f"{side}.layers"] = typed(clip_checkpoint.layer_shapes(encoder), encoder.layers)
  tokens, pixels = (
    jax.ShapeDtypeStruct((2, 77), np.int32),
    jax.ShapeDtypeStruct((2, 3, 224, 224), np.float32),
  )
  for embed, rows in ((hf_clip.embed_tokens, tokens), (hf_clip.embed_pixels, pixels)):
    out = jax.eval_shape(lambda p, x, embed=embed: embed(config, p, x), params, rows)
    assert (out.shape, out.dtype) == ((2, stored.projection_dim), np.float32)


def change_config(folder, part, **fields):
  config = json.loads((folder / clip_checkpoint.CONFIG).read_text())
  (config[part] if part else config).update(fields)
  (folder / clip_checkpoint.CONFIG).write_text(json.dumps(config))


def change_tensor(folder, name, change):
  tensors = safetensors.numpy.load_file(folder / clip_checkpoint.WEIGHTS)
  value = change(tensors.pop(name))
  safetensors.numpy.save_file(
    tensors | ({} if value is None else {name: value}), folder / clip_checkpoint.WEIGHTS
  )


PROJECTION = "text_projection.weight"
MISTAKES = {
  "no config": lambda f: (f / "config.json").unlink(),
  "another model": lambda f: change_config(f, "", model_type="siglip"),
  "wrong field": lambda f: change_config(f, "text_config", hidden_size=33),
  "activation": lambda f: change_config(f, "vision_config", hidden_act="relu"),
  "channels": lambda f: change_config(f, "vision_config", num_channels=1),
  "two patch sizes": lambda f: change_config(f, "vision_config", patch_size=[4, 4]),
  "no weights": lambda f: (f / clip_checkpoint.WEIGHTS).unlink(),
  "half of the weights": lambda f: (f / clip_checkpoint.WEIGHTS).write_bytes(b"half of a file"),
  "no tensor": lambda f: change_tensor(f, PROJECTION, lambda x: None),
  "shape": lambda f: change_tensor(f, PROJECTION, lambda x: x[1:]),
  "no tokenizer": lambda f: (f / "merges.txt").unlink(),
  "damaged tokenizer": lambda f: (f / "vocab.json").write_text("{"),
  "small vocabulary": lambda f: change_config(f, "text_config", vocab_size=99),
  "another end": lambda f: change_config(f, "text_config", eos_token_id=7),
  "no processor": lambda f: (f / "preprocessor_config.json").unlink(),
  "image size": lambda f: change_config(f, "vision_config", image_size=20),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_load_names_what_does_not_fit(mistake, copy):
  MISTAKES[mistake](copy)
  with refused(UserError, str(copy)):
    load(copy)
