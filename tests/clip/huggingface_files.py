"""Writes the files of a transformers CLIP model with random weights."""

import json

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers
import transformers

from cm3leon_jax.clip.huggingface import HFCLIP

START, END, VOCAB_SIZE, LENGTH, SIDE = 515, 516, 520, 12, 16
CAPTIONS = ["red", "A  red, red APPLE!", "größe ♥", "a caption that is too long for twelve tokens"]


def write_tokenizer(folder):
  """Writes a tokenizer with all bytes (also with </w>), three merges, a start and an end token."""
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
  """Saves and returns a CLIPModel whose tensors are random and not tiny."""
  torch = pytest.importorskip("torch")
  sizes = {"hidden_size": 32, "intermediate_size": 48}
  sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
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


def load(folder, dtype="float32", devices=1):
  return HFCLIP.load(folder, dtype, jax.devices()[:devices])


def some_tokens():
  """Returns captions [3, L] padded with end tokens; one contains an id above the end token."""
  tokens = np.random.default_rng(0).integers(3, START, (3, LENGTH)).astype(np.int32)
  tokens[:, 0], tokens[2, 4] = START, END + 2
  tokens[0, 5:], tokens[1, 9:], tokens[2, 7:] = END, END, END
  return tokens


def some_images(n, height=20, width=28):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)
