"""Writes a tiny random Chameleon in the published layout, with transformers' own class."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random

import numpy as np
from safetensors.numpy import save_file
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.tokenizers import published_files
from cm3leon_jax.tokenizers.published import FAMILIES
from tests.generation.run import make_config
from tests.importing import published

CODES, RESERVED, MERGED = 64, 40, 400  # Image codes, reserved names, tokens of BPE.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
OTHERS = ("<eoss>", "<racm3:break>", "<reserved08706>", "<image>")
ROWS = CODES + RESERVED + MERGED + len(SPECIAL) + len(OTHERS)
WIDTH, LAYERS, MLP, HEADS, SIDE = 32, 2, 48, 4, 8
VQ = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8, "base_channels": 32,
      "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": SIDE}  # fmt: skip
IMAGES = dataclasses.replace(
  FAMILIES["chameleon"], widths=(32, 32), latent_channels=8, code_dim=8, blocks=1, resolution=SIDE
)
MODEL = {"family": "chameleon", "num_layers": LAYERS, "width": WIDTH, "num_heads": HEADS,
         "num_kv_heads": 2, "mlp_width": MLP, "vocab_size": ROWS}  # fmt: skip


def image_name(code: int) -> str:
  return f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z"


def make_names(seed: int = 0) -> dict[str, int]:
  """Returns the id of each name, without those of BPE. Image ids ascend among the others."""
  ids = np.sort(np.random.default_rng(seed).permutation(range(len(SPECIAL), ROWS))[:CODES])
  names = {name: i for i, name in enumerate(SPECIAL)}
  names |= {image_name(code): int(i) for code, i in enumerate(ids)}
  reserved = [f"<reserved{8_710 + i:05d}>" for i in range(RESERVED)]
  free = (i for i in range(ROWS) if i not in {*names.values()})
  return names | dict(zip((*reserved, *OTHERS), free))


def save_tokenizer(folder: pathlib.Path, names: dict[str, int]) -> dict[str, int]:
  """Writes tokenizer.json with byte-level BPE; returns `names` with the names of BPE."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  split = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
           for pattern in ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                           r"([\t\n]|    |  )")]  # fmt: skip
  split += [pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("isolated")]
  split += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
  tokenizer.decoder = decoders.ByteLevel()
  rng = random.Random(0)
  texts = [*published.WORDS, *("".join(rng.choices("aeiourstnlm", k=7)) for _ in range(400))]
  trainer = trainers.BpeTrainer(
    vocab_size=MERGED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  free = (i for i in range(ROWS) if i not in {*names.values()})
  vocab = names | dict(zip(sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id), free))
  merges = json.loads(tokenizer.to_str())["model"]["merges"]
  made = tokenizers.Tokenizer(models.BPE(vocab, [(a, b) for a, b in merges]))
  made.pre_tokenizer, made.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
  made.add_special_tokens(list(names))
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
  )
  made.save(str(folder / "tokenizer.json"))
  roles = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<reserved08706>"}
  about = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", **roles}
  write_json(folder / "tokenizer_config.json", about)
  write_json(folder / "processor_config.json", {"processor_class": "ChameleonProcessor"})
  (folder / "LICENSE").write_text("for research\n")
  return vocab


def save(folder: pathlib.Path, dtype: str = "bfloat16", shards: str = "200KB", **fields):
  """Saves a ChameleonForConditionalGeneration with all its files; returns it in fp32.

  Like folders made by transformers' conversion, it lacks the image decoder. vqgan.safetensors has
  the whole image tokenizer, like the release.
  """
  import torch
  import transformers

  folder.mkdir(parents=True, exist_ok=True)
  names = save_tokenizer(folder, make_names())
  fields = {"num_key_value_heads": 2, **fields}
  config = transformers.ChameleonConfig(
    vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, max_position_embeddings=256, vocabulary_map=names, vq_config=VQ,
    pad_token_id=names["<pad>"], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    **fields,
  )  # fmt: skip
  model = transformers.ChameleonForConditionalGeneration(config)
  published.randomize(model)
  model = model.to(getattr(torch, dtype))
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # No progress bars.
    model.save_pretrained(folder, max_shard_size=shards)
    loaded = type(model).from_pretrained(folder, dtype="float32").eval()
  save_vqgan(folder, model.model.vqmodel)
  return loaded


def save_vqgan(folder: pathlib.Path, encoder) -> None:
  """Writes the tensors of an encoder, in fp32, with a random decoder, like the release's file."""
  rng, kept = np.random.default_rng(1), encoder.float().state_dict()
  tensors = {
    name: kept[name].numpy() if name in kept else rng.normal(0, 0.1, shape).astype(np.float32)
    for name, shape in published_files.tensor_shapes(IMAGES, CODES).items()
  }
  tensors["loss.weight"] = np.zeros((2, 2), np.float32)
  save_file(tensors, folder / "vqgan.safetensors")


def make_settings(**vocab):
  """Returns the settings that the tiny Chameleon needs."""
  config = make_config()
  config.vocab.update(num_special=16, text_size=ROWS - CODES, image_size=CODES)
  config.vocab.update(template="chameleon", **vocab)
  config.model.update(MODEL)
  return settings_from_config(config)
