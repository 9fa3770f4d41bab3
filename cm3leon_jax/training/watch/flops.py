"""Computes the model FLOPs of training, and the model FLOP utilization (MFU) of known devices."""

# K layers, D width, A total width of the heads, F feed-forward, V vocabulary, L length of a row.

import dataclasses

from cm3leon_jax.config.groups import Groups, Tuned
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.models import adapters
from cm3leon_jax.models.transformer import KEPT

# JAX's name of a device kind -> peak of dense bfloat16 matmuls of one device, in FLOP/s.
# A kind matches the first entry that is equal to it or to its first words, so longer names precede
# shorter ones. Sources: docs.cloud.google.com/tpu/docs/ for TPUs, and NVIDIA's data sheets, where
# those of H100 and H200 list twice these numbers, with sparsity.
PEAKS: dict[str, float | None] = {
  "TPU v4 lite": None,  # For inference only. Without this entry it would match "TPU v4".
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,  # Half of a chip, which is two devices.
  "NVIDIA A100": 312e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA H100 PCIe": 756.5e12,
  "NVIDIA H100 NVL": 835.5e12,
  "NVIDIA H100": 989.5e12,  # SXM.
  "NVIDIA H200 NVL": 835.5e12,
  "NVIDIA H200": 989.5e12,  # SXM.
}


def matmul_params(config: ModelConfig) -> int:
  """Counts the parameters used in matrix products: the layers' matrices and the output table.

  The output table counts even if it is also the embedding table. Embedding look-ups, positions and
  scales of norms are not matrix products, so they do not count.
  """
  K, D, F = config.num_layers, config.width, config.mlp_width
  A = (config.num_heads + config.key_heads) * config.head_dim
  mlp = 3 if config.traits.gated else 2
  return K * (2 * D * A + mlp * D * F) + config.vocab_size * D


def model_flops(
  config: ModelConfig, tokens: int, sequence_length: int, tuned: Tuned | None = None
) -> float:
  """Computes the model FLOPs of the forward and backward pass over `tokens` tokens.

  The definition is PaLM's (Chowdhery et al. 2022, appendix B), except that attention is counted as
  causal:

    tokens x (6 x matmul_params + 12 x K x A x L / 2)

  A matrix product takes 2 FLOPs per parameter and token in the forward pass and 4 in the backward
  pass. Attention multiplies queries by keys and weights by values. In each of K layers, this takes
  2 x 2 x A FLOPs for every key that a query sees, and 3 times as many with the backward pass. A
  query in a row of length L sees L / 2 keys on average (PaLM counts all L). Boundaries between
  samples in a packed row are ignored, and recomputation (`remat_policy`) does not count. `tokens`
  is rows x L, including padding, and `sequence_length` is L. Returns FLOPs over all devices.

  Frozen matrices take 2 FLOPs in the backward pass, because they have no gradients, and the
  parameters of adapters take 6. Layers before the first trained parameter have no backward pass.
  """
  A, back = config.num_heads * config.head_dim, config.num_layers
  table = config.vocab_size * config.width
  layer = (matmul_params(config) - table) // back
  trained = matmul_params(config)
  if isinstance(tuned, AdapterConfig):
    trained = 3 * adapters.count(config, tuned)
  elif tuned is not None:
    back = tuned.backward(config)
    row = tuned.first_row("embed" if config.traits.tied else "head")
    rows = 0 if row is None else config.vocab_size - row
    trained = len(tuned.layers(config)) * layer + rows * config.width
  attention = (4 * config.num_layers + 8 * back) * A * sequence_length / 2
  products = 2 * (matmul_params(config) + back * layer + (back > 0) * table + trained)
  return float(tokens * (products + attention))


def hardware_flops(
  config: ModelConfig, tokens: int, sequence_length: int, tuned: Tuned | None = None
) -> float:
  """Computes the FLOPs that a step executes: `model_flops` and what it computes again.

  The backward pass of a layer repeats the products whose results `remat_policy` does not keep,
  except the last one of the feed-forward layer, whose result it does not need. The kernels of
  attention multiply 7 times instead of 4 in the backward pass.
  """
  D, A = config.width, config.num_heads * config.head_dim
  forward = {
    "qkv": 2 * D * (A + 2 * config.key_heads * config.head_dim),
    "attention": 2 * A * sequence_length,
    "middle": 2 * D * A,
    "mlp": 2 * (2 if config.traits.gated else 1) * D * config.mlp_width,
  }
  kept = KEPT.get(config.remat_policy, KEPT["save_attention"])  # Also those of `offload`.
  again = sum(n for name, n in forward.items() if name not in kept)
  layer = again * (config.remat_policy != "none") + 3 * forward["attention"] / 2
  back = tuned.backward(config) if isinstance(tuned, Groups) else config.num_layers
  return model_flops(config, tokens, sequence_length, tuned) + tokens * back * layer


def device_peak(device_kind: str) -> float | None:
  """Returns a device's peak FLOP/s in dense bfloat16 matrix products, see `PEAKS`.

  Returns None for CPUs and for other kinds that are not in the table, instead of a guess.
  """
  for name, peak in PEAKS.items():
    if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-")):
      return peak
  return None


@dataclasses.dataclass(frozen=True)
class Rates:
  """Constants that convert the time of a step into rates.

  Attributes:
    flops: model FLOPs of a step, see `model_flops`.
    peak: peak FLOP/s of one device; None: unknown.
  """

  flops: float
  devices: int
  peak: float | None

  def of(self, weight: float, seconds: float, steps: int = 1) -> dict[str, float]:
    """Returns {"tokens_per_second": over all devices, "mfu": only if the peak is known}.

    `weight` is the sum of the loss weights, which counts the tokens. `seconds` is the total time of
    the steps.
    """
    rates = {"tokens_per_second": round(weight / seconds, 1)}
    if self.peak:
      rates["mfu"] = round(steps * self.flops / seconds / (self.devices * self.peak), 4)
    return rates
