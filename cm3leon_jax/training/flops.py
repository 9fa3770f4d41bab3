"""Model FLOPs of training, peaks of devices, and their ratio: model FLOP utilisation (MFU)."""

# K layers, D width, F feed-forward, V vocabulary, L length of a row.

import jax

from cm3leon_jax.models.config import ModelConfig

# Device kind as JAX names it -> (peak of dense bfloat16 products of one device in FLOP/s, where the number stands).
# The first entry counts that the kind is, or begins with as a whole word: special ones stand before the general.
PEAKS = {
  "TPU v4 lite": (
    None,
    "for inference only: no peak is known to us, and it must not pass for a v4",
  ),
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
  """Parameters that every token is multiplied by: those of the layers, and the output table (tied or not).

  Looking up embeddings and positions, and scaling in norms, are no matrix products and do not count.
  """
  K, D, F = config.num_layers, config.width, config.mlp_width
  mlp = 3 if config.family == "modern" else 2
  return K * (4 * D * D + mlp * D * F) + config.vocab_size * D


def model_flops(config: ModelConfig, tokens: int, sequence_length: int) -> float:
  """FLOPs that training on `tokens` tokens needs, forward and backward, whatever the program does to get there.

  The definition of PaLM (Chowdhery et al. 2022, appendix B), with causal attention counted as causal:

    tokens x (6 x matmul_params + 12 x K x D x L / 2)

  A product takes 2 FLOPs a parameter and token forwards and twice that backwards, hence 6. Attention multiplies queries by
  keys and weights by values: 2 x 2 x D FLOPs for every key that a query sees, times 3 with the backward pass, in each of K
  layers; in a row of L a query sees L / 2 keys on average (PaLM counts all L). Borders between the samples of a packed row
  are not counted off. What is computed again in the backward pass (`remat_policy`, chunks of the loss) is not counted.

  Args:
    config: of the decoder.
    tokens: slots of the batches, padding included: rows x L.
    sequence_length: L.

  Returns:
    FLOPs over all devices.
  """
  attention = 12 * config.num_layers * config.width * sequence_length / 2
  return float(tokens * (6 * matmul_params(config) + attention))


def device_peak(device_kind: str) -> float | None:
  """Peak of dense bfloat16 matrix products in FLOP/s of one device of the kind that `jax.Device.device_kind` names.

  None for a CPU and for any kind that the table `PEAKS` does not name: a peak is never guessed.
  """
  for name, (peak, _) in PEAKS.items():
    if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-")):
      return peak
  return None


def utilisation(flops_per_second: float, devices: int, peak: float | None) -> float | None:
  """MFU: model FLOPs per second over what `devices` devices of this peak (FLOP/s each) could do; None without a peak."""
  return flops_per_second / (devices * peak) if peak else None


def mesh_peak(given: float = 0.0) -> float | None:
  """Peak of one device of the current mesh: `given` if it is positive, else that of its kind; None if that is not known."""
  return given or device_peak(jax.sharding.get_mesh().devices.flat[0].device_kind)
