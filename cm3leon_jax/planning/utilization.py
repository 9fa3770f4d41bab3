"""Estimates the model FLOPs utilization (MFU) of a training from published measurements."""

import math
from typing import NamedTuple


class Measured(NamedTuple):
  """A published MFU. `chip` is a TPU generation or GPU model; `source` names model and place."""

  platform: str
  chip: str
  parameters: float
  mfu: float
  source: str


_LEVANTER = "Levanter, v3-256, docs of 2023"
_IRONWOOD = "MaxText, 64 chips, tpu-recipes training/ironwood, August 2026"
MEASURED = (
  Measured("tpu", "v3", 345e6, 0.351, f"GPT-2 345M in {_LEVANTER}"),
  Measured("tpu", "v3", 750e6, 0.389, f"GPT-2 750M in {_LEVANTER}"),
  Measured("tpu", "v3", 1.4e9, 0.417, f"GPT-2 1.4B in {_LEVANTER}"),
  Measured("tpu", "v3", 6.7e9, 0.473, f"GPT-2 6.7B in {_LEVANTER}"),
  Measured("tpu", "v6e", 8e9, 0.455, "Llama 3.1 8B in MaxText, v6e-256, its docs on tiering"),
  Measured("tpu", "tpu7x", 2e9, 0.387, f"Gemma 4 2B in {_IRONWOOD}"),
  Measured("tpu", "tpu7x", 4e9, 0.435, f"Gemma 4 4B in {_IRONWOOD}"),
  Measured("tpu", "tpu7x", 31e9, 0.459, f"Gemma 4 31B in {_IRONWOOD}"),
  # 5,762 tokens/s a GPU of 6 x 8.03e9 + 12 x 32 x 4,096 x 8,192 FLOPs each, of 989 TFLOP/s.
  Measured("gpu", "h100", 8e9, 0.356, "Llama 3.1 8B in torchtitan, 8 H100 with FSDP, 2024"),
)
OTHER_CHIP = 4.0  # A measurement on another chip counts like one of a model 4 times as large.


def nearest(platform: str, chip: str, parameters: float) -> Measured:
  """Returns the measurement on this platform that is nearest in size and chip.

  nearest("tpu", "v6e", 350e6).source = "GPT-2 345M in Levanter, v3-256, docs of 2023"
  """

  def distance(one: Measured) -> float:
    other = math.log(OTHER_CHIP) if one.chip != chip else 0.0
    return abs(math.log(one.parameters / parameters)) + other

  return min((one for one in MEASURED if one.platform == platform), key=distance)
