"""Model FLOPs of training, peaks of devices, and their ratio: model FLOP utilization (MFU)."""

# K layers, D width, A width of all heads, F feed-forward, V vocabulary, L length of a row.

import dataclasses

import jax

from cm3leon_jax.models.config import ModelConfig

# Device kind as JAX names it -> (peak of dense bfloat16 products of one device in FLOP/s, source).
# A kind has the first entry that equals it or is its first words, so special kinds come first.
PEAKS = {
  "TPU v4 lite": (None, "for inference only; without this entry it would count as a v4"),
  "TPU v4": (275e12, "docs.cloud.google.com/tpu/docs/v4"),
  "TPU v5 lite": (197e12, "docs.cloud.google.com/tpu/docs/v5e"),
  "TPU v5e": (197e12, "docs.cloud.google.com/tpu/docs/v5e"),
  "TPU v5p": (459e12, "docs.cloud.google.com/tpu/docs/v5p"),
  "TPU v5": (459e12, "docs.cloud.google.com/tpu/docs/v5p"),
  "TPU v6 lite": (918e12, "docs.cloud.google.com/tpu/docs/v6e"),
  "TPU v6e": (918e12, "docs.cloud.google.com/tpu/docs/v6e"),
  "NVIDIA A100": (312e12, "NVIDIA A100 data sheet: 312 TFLOPS without sparsity"),
  "NVIDIA H100 PCIe": (
    756.5e12,
    "NVIDIA H100 data sheet: 1,513 TFLOPS with sparsity, which doubles it",
  ),
  "NVIDIA H100 NVL": (
    835.5e12,
    "NVIDIA H100 data sheet: 1,671 TFLOPS with sparsity, which doubles it",
  ),
  "NVIDIA H100": (
    989.5e12,
    "NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, which doubles it",
  ),
  "NVIDIA H200 NVL": (
    835.5e12,
    "NVIDIA H200 data sheet: 1,671 TFLOPS with sparsity, which doubles it",
  ),
  "NVIDIA H200": (
    989.5e12,
    "NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity, which doubles it",
  ),
}


def matmul_params(config: ModelConfig) -> int:
  """Counts the parameters that every token is multiplied by: layers and output table, tied or not.

  Look-ups of embeddings and positions and scales of norms do not count: they are no products.
  """
  K, D, F = config.num_layers, config.width, config.mlp_width
  A = config.num_heads * config.head_dim
  mlp = 3 if config.traits.gated else 2
  return K * (4 * D * A + mlp * D * F) + config.vocab_size * D


def model_flops(config: ModelConfig, tokens: int, sequence_length: int) -> float:
  """Computes the FLOPs that the forward and backward pass over `tokens` tokens need at least.

  As defined for PaLM (Chowdhery et al. 2022, appendix B), with causal attention counted as causal:

    tokens x (6 x matmul_params + 12 x K x A x L / 2)

  A product takes 2 FLOPs a parameter and token in the forward pass and 4 in the backward pass, 6 in
  sum. Attention multiplies queries by keys and weights by values: 2 x 2 x A FLOPs for every key
  that a query sees, times 3 with the backward pass, in each of K layers. In a row of L a query sees
  L / 2 keys on average (PaLM counts all L); borders of the samples in a packed row are ignored.
  Values that the backward pass computes again (`remat_policy`) do not count.

  Args:
    config: of the decoder.
    tokens: slots of the batches, padding included: rows x L.
    sequence_length: L.

  Returns:
    FLOPs over all devices.
  """
  A = config.num_heads * config.head_dim
  attention = 12 * config.num_layers * A * sequence_length / 2
  return float(tokens * (6 * matmul_params(config) + attention))


def device_peak(device_kind: str) -> float | None:
  """Returns the peak of dense bfloat16 matrix products of a device in FLOP/s, see `PEAKS`.

  None for a CPU and for any other kind that is not in the table: a peak is never guessed.

  Args:
    device_kind: `jax.Device.device_kind`.
  """
  for name, (peak, _) in PEAKS.items():
    if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-")):
      return peak
  return None


def utilization(flops_per_second: float, devices: int, peak: float | None) -> float | None:
  """Computes MFU: model FLOP/s as a share of `devices` x `peak` FLOP/s; None without a peak."""
  return flops_per_second / (devices * peak) if peak else None


def mesh_peak(given: float = 0.0) -> float | None:
  """Returns `given` if it is positive, else `device_peak` of the devices of the current mesh."""
  return given or device_peak(jax.sharding.get_mesh().devices.flat[0].device_kind)


@dataclasses.dataclass(frozen=True)
class Rates:
  """Constants that turn the seconds of a step into rates.

  Attributes:
    flops: model FLOPs of a step, see `model_flops`.
    devices: number of devices of the mesh.
    peak: FLOP/s of one device, or None.
  """

  flops: float
  devices: int
  peak: float | None

  def of(self, weight: float, seconds: float, steps: int = 1) -> dict[str, float]:
    """Returns tokens_per_second of `weight` targets on all devices, and mfu if a peak is known.

    Args:
      weight: sum of the loss weights of the steps.
      seconds: that the steps took together.
      steps: number of steps.
    """
    mfu = utilization(steps * self.flops / seconds, self.devices, self.peak)
    return {
      "tokens_per_second": round(weight / seconds, 1),
      **({} if mfu is None else {"mfu": round(mfu, 4)}),
    }
