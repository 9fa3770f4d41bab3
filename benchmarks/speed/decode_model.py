"""Defines the model, the prompts and the timing that `decode` uses for all decoders."""

# B prompts, I new tokens.

from collections.abc import Callable, Sequence
import time

import jax
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.vocab import VocabLayout

BATCH, PROMPT, NEW_TOKENS = 4, 32, 256
MODEL = ModelConfig(
  vocab_size=64_512,
  num_layers=8,
  width=512,
  num_heads=8,
  mlp_width=2_048,
  max_positions=512,
  dtype="float32",
  remat_policy="none",
)

# Function of B prompts (int32 ids) and a seed, which returns [B, I] ids.
Peer = Callable[[Sequence[np.ndarray], int], np.ndarray]


def random_params(config: ModelConfig, std: float = 0.02, seed: int = 0) -> dict:
  """Samples all parameters on the host, including residual outputs, so that logits are not tiny."""
  rng = np.random.default_rng(seed)
  with jax.set_mesh(create_mesh(MeshConfig(), jax.devices()[:1])):
    types = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  return jax.tree.map(lambda x: std * rng.standard_normal(x.shape, np.float32), types)


def rates(
  peers: dict[str, Peer], prompts: Sequence[np.ndarray], runs: int
) -> dict[str, list[float]]:
  """Measures the tokens/s of each peer in `runs` runs after an untimed run. The peers alternate."""
  measured = {name: [] for name in peers}
  for seed in range(runs + 1):
    for name, peer in peers.items():
      start = time.perf_counter()
      tokens = peer(prompts, seed).size
      measured[name].append(tokens / (time.perf_counter() - start))
  return {name: x[1:] for name, x in measured.items()}


def random_prompts(vocab: VocabLayout, batch: int, length: int, seed: int = 0) -> list[np.ndarray]:
  """Samples `batch` prompts of the form `</s> caption <break>`, each of `length` ids."""
  captions = np.random.default_rng(seed).integers(
    vocab.num_special, vocab.text_size, (batch, length - 2)
  )
  return [np.array([vocab.eos, *caption, vocab.brk], np.int32) for caption in captions]
