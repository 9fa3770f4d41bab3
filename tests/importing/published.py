"""Writes random models and tokenizers in published formats, with transformers."""

import contextlib
import os
import pathlib
import random

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

ROWS = 480  # Number of rows of the embedding; as in Qwen3, larger than the number of tokens.
TOKENS = 470
# Added token -> whether it is special.
ADDED = {"<|endoftext|>": True, "<think>": False, "</s>": True}
# As in Qwen's tokenizer, numbers are split into digits, and one punctuation mark joins the letters
# after it.
SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [f"{a} {b} left of {c}" for a in ("red", "blue", "green") for b in ("bell", "key", "hat")
         for c in ("the tree", "a river", "3 roads", "naïve cafés")]  # fmt: skip


def save_tokenizer(
  folder: pathlib.Path, normalizer=None, gpt2: bool = False
) -> tokenizers.Tokenizer:
  """Writes and returns a byte-level BPE tokenizer with `TOKENS` ids, like that of Qwen or GPT-2."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC() if normalizer is None else normalizer
  if gpt2:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
  tokenizer.decoder = decoders.ByteLevel()
  rng = random.Random(0)
  texts = [*WORDS, *("".join(rng.choices("aeiourstnlm", k=7)) for _ in range(400))]
  trainer = trainers.BpeTrainer(
    vocab_size=TOKENS - len(ADDED),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
    min_frequency=1,
  )
  tokenizer.train_from_iterator(texts, trainer)
  for name, special in ADDED.items():
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False)])
  assert tokenizer.get_vocab_size() == TOKENS
  (folder / "tokenizer.json").write_text(tokenizer.to_str())
  return tokenizer


def randomize(model, seed: int = 0) -> None:
  """Sets random weights that are not tiny; the scales of norms are around 1."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
      x.copy_(mean + 0.3 * torch.randn(x.shape, generator=generator))


def _save(model, folder: pathlib.Path, **options):
  """Saves a model and loads it again, so that its rotary frequencies are not rounded."""
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # No progress bars.
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder, dtype="float32").eval()


def save_qwen3(folder: pathlib.Path, dtype="float32", shards: str = "50GB", **fields):
  """Saves a Qwen3ForCausalLM and its tokenizer; returns the model as transformers loads it."""
  import torch
  import transformers

  folder.mkdir(parents=True, exist_ok=True)
  fields = {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True, **fields}
  rope = {"rope_type": "default", "rope_theta": 1e6}
  config = transformers.Qwen3Config(
    vocab_size=ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope,
    eos_token_id=TOKENS - 3, **fields,
  )  # fmt: skip
  model = transformers.Qwen3ForCausalLM(config)
  randomize(model)
  save_tokenizer(folder)
  return _save(model.to(getattr(torch, dtype)), folder, max_shard_size=shards)
