"""Loads and checks rewards that a user wrote: `config.reinforce.reward = "FILE.py:FUNCTION"`."""

# B samples, H height, W width.

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from cm3leon_jax.config import own_functions
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.sample import Sample


@dataclasses.dataclass(frozen=True)
class OwnReward:
  """Reward function of a user, see `rewards.Reward`.

    def blue(prompts, images, records):
      return (images[..., 2] > images[..., 0]).mean((1, 2))

  Attributes:
    name: FILE.py:FUNCTION.
    function: (prompts, images, records) -> [B] finite numbers. The prompts are the texts that the
      model received, and the images uint8 [B, H, W, 3].
  """

  name: str
  function: Callable[[list[str], UInt8[np.ndarray, "B H W 3"], list[Record]], Any]

  @classmethod
  def load(cls, name: str) -> "OwnReward":
    """Imports the file and returns its function."""
    return cls(name, own_functions.load(name, "reinforce.reward"))

  def __call__(
    self, records: Sequence[Record], samples: Sequence[Sample]
  ) -> Float32[np.ndarray, " B"]:
    """Scores samples.

    Raises:
      UserError: the function does not return one finite number per sample.
    """
    images = np.stack([sample.segments[0] for sample in samples])
    prompts = [sample.task.prompt for sample in samples]
    scores = np.asarray(self.function(prompts, images, list(records)), np.float32)
    if scores.shape != (len(images),) or not np.isfinite(scores).all():
      raise UserError(
        f"config.reinforce.reward: {self.name} must return one finite score per image, shape "
        f"({len(images)},); it returned an array of shape {scores.shape}: {scores.tolist()}."
      )
    return scores
