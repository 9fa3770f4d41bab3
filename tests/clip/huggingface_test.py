import dataclasses

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.clip import checkpoint as clip_checkpoint
from cm3leon_jax.clip import huggingface as hf_clip
from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.raw import reader
from cm3leon_jax.retrieval import bank, neighbors
from cm3leon_jax.stages.shards import Runner
from tests.clip.huggingface_files import (
  CAPTIONS,
  END,
  LENGTH,
  SIDE,
  load,
  some_images,
  some_tokens,
  write_checkpoint,
)
from tests.data.raw_folder import write_raw

TOLERANCE = 1e-5  # Tolerance in fp32, for embeddings of norm 1.
KINDS = {"old": ("quick_gelu", clip_checkpoint.OLD_EOS_ID), "new": ("gelu", END)}
NORMALIZE = (  # Mean and standard deviation of the color channels.
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  return folder, write_checkpoint(folder, *KINDS[request.param])


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
  # Negative controls: the other activation function, and the other way to find the end of a
  # caption.
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
  # In these rows the end token is the largest id, so both ways find it.
  assert np.abs(embed(clip.config)[:2] - embed(wrong)[:2]).max() < TOLERANCE


def test_captions_equal_torch(checkpoint):
  path, model = checkpoint
  clip = load(path)
  padded = clip.tokenizer(
    CAPTIONS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
  )
  ids = [clip.encode(caption) for caption in CAPTIONS]
  np.testing.assert_array_equal(clip.pad_texts(ids), padded["input_ids"])
  assert ids[0].tolist() == [513]  # The token `red</w>`.
  expected, _ = torch_embeddings(
    model, padded["input_ids"], np.zeros((1, 3, SIDE, SIDE), np.float32)
  )
  np.testing.assert_allclose(clip.embed_texts(ids), expected, atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(clip.embed_texts(ids[1:2])[0], expected[1], atol=TOLERANCE, rtol=0)
  # A caption without words still has a start token and an end token.
  assert clip.embed_texts([ids[0][:0]]).shape == (1, 24)


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


# Written to a module, so that `tests.launched` can run it.


def test_it_builds_neighbors_of_raw_pairs(folder, tmp_path):
  """Uses token dropout in the queries, and images that must be resized."""
  splits = ["train", "train", "train", "heldout"]
  pairs = [
    {"key": f"k{i}", "caption": f"the k{i} red apples", "split": splits[i % 4]} for i in range(12)
  ]
  write_raw(tmp_path / "raw", pairs, some_images(12))
  clip = load(folder)
  config = RetrievalConfig(backend="exact", max_similarity=1.0)
  job = bank.EmbedJob(str(tmp_path / "raw"), str(tmp_path / "out"), lambda: clip, 0.5, 0, {})
  neighbors.build_neighbors(config, job, bank.embedding_width(str(folder), tmp_path), {}, Runner())
  rows, train = (
    bank.Embeddings(tmp_path / "out" / "train"),
    reader.read_pairs(tmp_path / "raw", "train"),
  )
  images = clip.embed_images(reader.load_images([p.image for p in train], None, 1))
  texts = clip.embed_texts([clip.encode(p.caption) for p in train])
  np.testing.assert_allclose(rows.images[:], images, atol=1e-3)
  np.testing.assert_allclose(rows.documents[:], bank.document_embeddings(texts, images), atol=1e-3)
  dropped = [bank.drop_tokens(clip.encode(p.caption), 0.5, p.key, 0) for p in train]
  np.testing.assert_allclose(rows.queries[:], clip.embed_texts(dropped), atol=1e-3)
  assert np.abs(rows.queries[:] - texts).max() > 1e-2
