"""Estimates the model FLOPs utilization (MFU) of a training from published measurements.

An MFU leaves out what the backward pass computes again, so it depends on the remat policy. The
estimate assumes that the policy does not change the speed at which devices execute FLOPs.
"""

import dataclasses
import math
from typing import NamedTuple

from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import ModelConfig, RematPolicy
from cm3leon_jax.training.watch.flops import hardware_flops


class Measured(NamedTuple):
  """A published measurement. `chip` is a TPU generation or GPU model; `source` names it.

  `mfu` counts `model_flops`, unless `source` says otherwise. `remat` is the policy of this project
  that computes about as much again as the measured run.
  """

  platform: str
  chip: str
  parameters: float
  mfu: float
  source: str
  remat: RematPolicy = "full"

  def mfu_of(self, model: ModelConfig, length: int, tuned: Tuned | None) -> float:
    """Returns the MFU of `model` with its own remat policy, in rows of `length` tokens."""
    there, here = (
      hardware_flops(dataclasses.replace(model, remat_policy=policy), 1, length, tuned)
      for policy in (self.remat, model.remat_policy)
    )
    return self.mfu * there / here


_LEVANTER = "Levanter, v3-256, docs of 2023, by its own count"
_IRONWOOD = "MaxText, 64 chips, tpu-recipes training/ironwood, August 2026"
_TIERING = "MaxText, v6e-256, its docs on tiering"
_TITAN = "torchtitan, 8 H100 with FSDP, 2024"
# Levanter and the two small Gemmas keep nothing. Llama in MaxText keeps queries, keys, values and
# attention's projection, Gemma 31B the latter and the result, torchtitan half the products.
# The pages of Llama count attention to all keys (45.5%, 33%), so its MFU is computed from their
# 7,207 and 5,762 tokens/s a device.
MEASURED = (
  Measured("tpu", "v3", 345e6, 0.351, f"GPT-2 345M in {_LEVANTER}"),
  Measured("tpu", "v3", 750e6, 0.389, f"GPT-2 750M in {_LEVANTER}"),
  Measured("tpu", "v3", 1.4e9, 0.417, f"GPT-2 1.4B in {_LEVANTER}"),
  Measured("tpu", "v3", 6.7e9, 0.473, f"GPT-2 6.7B in {_LEVANTER}"),
  Measured("tpu", "v6e", 8e9, 0.404, f"Llama 3.1 8B in {_TIERING}", "save_qkv"),
  Measured("tpu", "tpu7x", 2e9, 0.387, f"Gemma 4 2B in {_IRONWOOD}"),
  Measured("tpu", "tpu7x", 4e9, 0.435, f"Gemma 4 4B in {_IRONWOOD}"),
  Measured("tpu", "tpu7x", 31e9, 0.459, f"Gemma 4 31B in {_IRONWOOD}", "save_attention"),
  Measured("gpu", "h100", 8e9, 0.300, f"Llama 3.1 8B in {_TITAN}", "save_qkv"),
)
OTHER_CHIP = 4.0  # A measurement on another chip counts like one of a model 4 times as large.


def nearest(platform: str, chip: str, parameters: float) -> Measured:
  """Returns the measurement on this platform that is nearest in size and chip.

  nearest("tpu", "v6e", 350e6).mfu = 0.351
  """

  def distance(one: Measured) -> float:
    other = math.log(OTHER_CHIP) if one.chip != chip else 0.0
    return abs(math.log(one.parameters / parameters)) + other

  return min((one for one in MEASURED if one.platform == platform), key=distance)
