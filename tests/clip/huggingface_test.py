"""Checkpoints of transformers' CLIPModel with random weights embed as CLIPModel does."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
from tokenizers import pre_tokenizers
import transformers

from cm3leon_jax import stages
from cm3leon_jax.clip import checkpoint as clip_checkpoint
from cm3leon_jax.clip import huggingface as hf_clip
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.retrieval import bank, neighbors
from cm3leon_jax.settings import default_config, settings_from_config
from cm3leon_jax.shards import Runner
from tests.data.raw import write_raw

TOLERANCE = 1e-5  # fp32, embeddings of norm 1.
START, END, VOCAB_SIZE, LENGTH, SIDE = 515, 516, 520, 12, 16
CAPTIONS = ["red", "A  red, red APPLE!", "größe ♥", "a caption that is too long for twelve tokens"]
KINDS = {"old": ("quick_gelu", clip_checkpoint.OLD_EOS_ID), "new": ("gelu", END)}
NORMALIZE = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)  # Mean and deviation.


def write_tokenizer(folder):
  """All bytes, inside of a word and at its end, three merges, start and end."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ["r e", "re d</w>", "p p"]
  words = (
    letters
    + [c + "</w>" for c in letters]
    + [m.replace(" ", "") for m in merges]
    + ["<|startoftext|>", "<|endoftext|>"]
  )
  (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def write_checkpoint(folder, activation, eos_id, **save):
  """Saves a CLIPModel whose every tensor is random and not tiny, and returns it."""
  torch = pytest.importorskip("torch")
  sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
  }
  sizes |= {"hidden_act": activation, "layer_norm_eps": 1e-3}
  text = {**sizes, "vocab_size": VOCAB_SIZE, "max_position_embeddings": LENGTH}
  text |= {"bos_token_id": START, "eos_token_id": eos_id}
  vision = {**sizes, "hidden_size": 40, "image_size": SIDE, "patch_size": 4}
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
  model = transformers.CLIPModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      value.normal_(0, 0.3, generator=generator).add_(
        float("norm" in name and name.endswith("weight"))
      )
  model.save_pretrained(folder, **save)
  write_tokenizer(folder)
  transformers.CLIPImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
  ).save_pretrained(folder)
  return model


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  return folder, write_checkpoint(folder, *KINDS[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip")
  write_checkpoint(path, "quick_gelu", END)
  return path


@pytest.fixture
def copy(folder, tmp_path):
  """A checkpoint that a test may spoil."""
  return shutil.copytree(folder, tmp_path / "copy")


def load(folder, dtype="float32", devices=1):
  return HFCLIP.load(folder, dtype, jax.devices()[:devices])


def some_images(n, height=20, width=28):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


def some_tokens():
  """Makes [3, L] with the end in the middle; one row has a larger id (an added token) before it."""
  tokens = np.random.default_rng(0).integers(3, START, (3, LENGTH)).astype(np.int32)
  tokens[:, 0], tokens[2, 4] = START, END + 2
  tokens[0, 5:], tokens[1, 9:], tokens[2, 7:] = END, END, END
  return tokens


def torch_embeddings(model, tokens, pixels):
  import torch

  with torch.no_grad():
    texts = model.get_text_features(input_ids=torch.tensor(tokens, dtype=torch.long))
    images = model.get_image_features(pixel_values=torch.tensor(pixels))
  vectors = (texts.pooler_output, images.pooler_output)
  return [(x / x.norm(dim=-1, keepdim=True)).numpy() for x in vectors]


def test_embeddings_equal_torch(checkpoint):
  path, model = checkpoint
  clip = load(path)
  images, tokens = some_images(3), some_tokens()
  pixels = clip_checkpoint.preprocess(clip.processor, images)
  texts, image_embeddings = torch_embeddings(model, tokens, pixels)

  def embed(config):
    return np.asarray(hf_clip.embed_tokens(config, clip.params, tokens))

  np.testing.assert_allclose(embed(clip.config), texts, atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(clip.embed_images(images), image_embeddings, atol=TOLERANCE, rtol=0)
  assert clip.embed_images(images).dtype == np.float32
  # Negative controls: another activation, the other rule of where a caption ends.
  other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[clip.config.text.activation]
  for wrong in (
    dataclasses.replace(clip.config, text=dataclasses.replace(clip.config.text, activation=other)),
    dataclasses.replace(
      clip.config,
      eos_id=END
      if clip.config.eos_id == clip_checkpoint.OLD_EOS_ID
      else clip_checkpoint.OLD_EOS_ID,
    ),
  ):
    assert np.abs(embed(wrong) - texts).max() > 100 * TOLERANCE
  # Rows where the end is the largest id.
  assert np.abs(embed(clip.config)[:2] - embed(wrong)[:2]).max() < TOLERANCE


def test_captions_equal_torch(checkpoint):
  path, model = checkpoint
  clip = load(path)
  padded = clip.tokenizer(
    CAPTIONS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
  )
  ids = [clip.encode(caption) for caption in CAPTIONS]
  np.testing.assert_array_equal(clip.pad_texts(ids), padded["input_ids"])
  assert ids[0].tolist() == [513]  # `red</w>`
  expected, _ = torch_embeddings(
    model, padded["input_ids"], np.zeros((1, 3, SIDE, SIDE), np.float32)
  )
  np.testing.assert_allclose(clip.embed_texts(ids), expected, atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(clip.embed_texts(ids[1:2])[0], expected[1], atol=TOLERANCE, rtol=0)
  # A caption without tokens has start and end.
  assert clip.embed_texts([ids[0][:0]]).shape == (1, 24)


def test_every_tensor_matters(folder):
  """All that a checkpoint holds is used; only a key's bias cannot matter to a softmax."""
  clip, tokens = load(folder), some_tokens()
  pixels = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)

  def embed(params):
    texts = hf_clip.embed_tokens(clip.config, params, tokens)
    return texts, hf_clip.embed_pixels(clip.config, params, pixels)

  before = embed(clip.params)
  paths = jax.tree_util.tree_leaves_with_path(clip.params)
  assert len(paths) == 13 + 2 * 16
  for path, value in paths:
    noise = 0.1 * jnp.sin(jnp.arange(value.size).reshape(value.shape))
    changed = jax.tree_util.tree_map_with_path(
      lambda p, x, path=path, noise=noise: x + noise if p == path else x, clip.params
    )
    after = embed(changed)
    difference = max(float(jnp.abs(a - b).max()) for a, b in zip(before, after))
    assert (difference > 100 * TOLERANCE) != ("k_proj.bias" in jax.tree_util.keystr(path)), (
      path,
      value.shape,
    )


def test_eight_devices_embed_as_one(folder):
  images, one, eight = some_images(70), load(folder), load(folder, devices=8)
  texts = [one.encode(f"{i} apples") for i in range(70)]
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(eight.params))
  with jax.set_mesh(create_mesh(MeshConfig(2, 2, 2))):  # As in generation.
    np.testing.assert_allclose(eight.embed_images(images), one.embed_images(images), atol=1e-6)
    np.testing.assert_allclose(eight.embed_texts(texts), one.embed_texts(texts), atol=1e-6)
  assert np.abs(np.diff(one.embed_images(images), axis=0)).max(1).min() > 1e-3


def test_bfloat16_is_close(folder):
  exact, rounded = load(folder), load(folder, "bfloat16")
  assert rounded.params["text_projection.weight"].dtype == jnp.bfloat16
  assert rounded.params["text_model.layers"]["layer_norm1.weight"].dtype == np.float32
  texts = [exact.encode(caption) for caption in CAPTIONS]
  for a, b in (
    (exact.embed_texts(texts), rounded.embed_texts(texts)),
    (exact.embed_images(some_images(4)), rounded.embed_images(some_images(4))),
  ):
    assert b.dtype == np.float32
    assert (a * b).sum(1).min() > 0.99
    assert np.abs(a - b).max() > 1e-5


@pytest.mark.parametrize(("height", "width"), [(20, 28), (16, 16), (48, 16), (3, 5)])
def test_preprocessing_scales_crops_and_normalizes(folder, height, width):
  images = some_images(2, height, width)
  pixels = clip_checkpoint.preprocess(load(folder).processor, images)
  assert pixels.dtype == np.float32
  short = min(height, width)
  h, w = SIDE * height // short, SIDE * width // short
  top, left = (h - SIDE) // 2, (w - SIDE) // 2
  for image, result in zip(images, pixels):
    scaled = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)) / 255
    cropped = scaled[top : top + SIDE, left : left + SIDE]
    expected = (cropped - np.array(NORMALIZE[0])[None, None]) / np.array(NORMALIZE[1])[None, None]
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1), atol=1e-5)


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
  with pytest.raises(UserError, match=r"model-00001-of-.* does not exist, but"):
    load(tmp_path)


@pytest.mark.parametrize("patch", [32, 14])
def test_published_layouts(patch, tmp_path):
  """ViT-B/32 and ViT-L/14 have the tensors of transformers' CLIPModel and embed."""
  torch = pytest.importorskip("torch")
  large = patch == 14
  text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} if large else {}
  vision = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
  }
  vision = {**(vision if large else {}), "patch_size": patch}
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
  "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
  "another model": (
    lambda f: change_config(f, "", model_type="siglip"),
    "model_type is 'siglip'; it must be 'clip'",
  ),
  "wrong field": (
    lambda f: change_config(f, "text_config", hidden_size=33),
    "is not a CLIP config",
  ),
  "activation": (
    lambda f: change_config(f, "vision_config", hidden_act="relu"),
    r"vision_config\.hidden_act is 'relu'",
  ),
  "channels": (lambda f: change_config(f, "vision_config", num_channels=1), "num_channels is 1"),
  "two patch sizes": (
    lambda f: change_config(f, "vision_config", patch_size=[4, 4]),
    r"patch_size is .4, 4.",
  ),
  "no weights": (
    lambda f: (f / clip_checkpoint.WEIGHTS).unlink(),
    r"model\.safetensors does not exist, nor",
  ),
  "half of the weights": (
    lambda f: (f / clip_checkpoint.WEIGHTS).write_bytes(b"half of a file"),
    "is damaged",
  ),
  "no tensor": (
    lambda f: change_tensor(f, PROJECTION, lambda x: None),
    "has no tensor 'text_projection.weight'",
  ),
  "shape": (
    lambda f: change_tensor(f, PROJECTION, lambda x: x[1:]),
    r"'text_projection.weight' is \[23, 32\];.*\[24, 32\]",
  ),
  "no tokenizer": (lambda f: (f / "merges.txt").unlink(), "has no tokenizer"),
  "damaged tokenizer": (lambda f: (f / "vocab.json").write_text("{"), "cannot be read"),
  "small vocabulary": (lambda f: change_config(f, "text_config", vocab_size=99), "has 517 ids"),
  "another end": (
    lambda f: change_config(f, "text_config", eos_token_id=7),
    "end is 516; config.json's eos_token_id = 7",
  ),
  "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "has no image processor"),
  "image size": (
    lambda f: change_config(f, "vision_config", image_size=20),
    r"makes images \[3, 16, 16\]",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_load_names_what_does_not_fit(mistake, copy):
  spoil, message = MISTAKES[mistake]
  spoil(copy)
  with pytest.raises(UserError, match=message):
    load(copy)


def test_other_mistakes(folder):
  with pytest.raises(UserError, match=r"openai/clip is not a folder.*hf download"):
    HFCLIP.load("openai/clip")
  with pytest.raises(ValueError, match="dtype is 'float16'"):
    HFCLIP.load(folder, "float16")
  with pytest.raises(UserError, match=r"float64\[1, 8, 8, 3\]; they must be uint8\[B, H, W, 3\]"):
    load(folder).embed_images(np.zeros((1, 8, 8, 3)))


def test_it_needs_no_torch(folder):
  script = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # Not to be imported.
import numpy as np
from cm3leon_jax.clip.huggingface import HFCLIP
clip = HFCLIP.load({str(folder)!r})
images = np.zeros((2, 20, 28, 3), np.uint8)
print(clip.embed_texts([clip.encode("red")]).shape, clip.embed_images(images).shape)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
  assert done.stdout.endswith("(1, 24) (2, 24)\n"), done.stderr


def test_it_builds_neighbors_of_raw_pairs(folder, tmp_path):
  """The stage runs: queries are captions with tokens dropped, images have their own size."""
  splits = ["train", "train", "train", "heldout"]
  pairs = [
    {"key": f"k{i}", "caption": f"the k{i} red apples", "split": splits[i % 4]} for i in range(12)
  ]
  write_raw(tmp_path / "raw", pairs, some_images(12))
  clip = load(folder)
  config = neighbors.RetrievalConfig(backend="exact", max_similarity=1.0)
  job = bank.EmbedJob(str(tmp_path / "raw"), str(tmp_path / "out"), lambda: clip, 0.5, 0, {})
  neighbors.build_neighbors(config, job, bank.embedding_width(str(folder), tmp_path), {}, Runner())
  rows, train = (
    bank.Embeddings(tmp_path / "out" / "train"),
    raw_pairs.read_pairs(tmp_path / "raw", "train"),
  )
  images = clip.embed_images(raw_pairs.load_images([p.image for p in train], None, 1))
  texts = clip.embed_texts([clip.encode(p.caption) for p in train])
  np.testing.assert_allclose(rows.images[:], images, atol=1e-3)
  np.testing.assert_allclose(rows.documents[:], bank.document_embeddings(texts, images), atol=1e-3)
  dropped = [bank.drop_tokens(clip.encode(p.caption), 0.5, p.key, 0) for p in train]
  np.testing.assert_allclose(rows.queries[:], clip.embed_texts(dropped), atol=1e-3)
  assert np.abs(rows.queries[:] - texts).max() > 1e-2


def test_the_config_chooses_it(folder, tmp_path):
  config = default_config()
  config.retrieval.clip = str(folder)
  settings = settings_from_config(config)
  assert stages.own_clip(settings) == ()
  clip = bank.load_clip(settings.retrieval.clip, tmp_path, settings.vocab)
  assert isinstance(clip, HFCLIP)
  assert clip.mesh.size == 8
  with pytest.raises(UserError, match="train_text_tokenizer"):
    stages.inputs(settings_from_config(default_config()), tmp_path, "samples")
