"""Loads and checks rewards that a user wrote: `config.reinforce.reward = "FILE.py:FUNCTION"`."""

# B samples, H height, W width.

from collections.abc import Callable, Sequence
import dataclasses
import importlib.util
import pathlib
import sys
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.generation.sample import Sample

GRAY = 128  # Pixel value of the images on which a reward is tried.


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
    """Imports the function.

    Raises:
      UserError: there is no such file or function, or the file cannot be imported.
    """
    file, _, function = name.rpartition(":")
    path = pathlib.Path(file)
    if not path.is_file():
      raise UserError(f"config.reinforce.reward is '{name}', but there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
      spec.loader.exec_module(module)
    except Exception as error:  # Code of the user can raise any error.
      raise UserError(
        f"config.reinforce.reward is '{name}', but {path} cannot be imported: "
        f"{type(error).__name__}: {error}"
      ) from error
    found = getattr(module, function, None)
    if not callable(found):
      raise UserError(
        f"config.reinforce.reward is '{name}', but {path} has no function {function}."
      )
    return cls(name, found)

  def __call__(
    self, records: Sequence[Record], samples: Sequence[Sample]
  ) -> Float32[np.ndarray, " B"]:
    """Scores samples, see `score`."""
    images = np.stack([sample.segments[0] for sample in samples])
    return self.score([sample.task.prompt for sample in samples], images, records)

  def score(
    self,
    prompts: Sequence[str],
    images: UInt8[np.ndarray, "B H W 3"],
    records: Sequence[Record],
  ) -> Float32[np.ndarray, " B"]:
    """Calls the function and checks its result.

    Raises:
      UserError: the function raises an error, or does not return one finite number per image.
    """
    try:
      found = np.asarray(self.function(list(prompts), images, list(records)))
      scores = found.astype(np.float32)
    except Exception as error:  # Code of the user can raise any error.
      raise UserError(
        f"config.reinforce.reward: {self.name} raised {type(error).__name__}: {error}"
      ) from error
    if found.shape != (len(images),):
      raise UserError(
        f"config.reinforce.reward: {self.name} returned an array of shape {found.shape} for "
        f"{len(images)} images; it must return one score per image, shape ({len(images)},)."
      )
    if not np.isfinite(scores).all():
      place = int(np.flatnonzero(~np.isfinite(scores))[0])
      raise UserError(
        f"config.reinforce.reward: {self.name} returned {found[place]} for the prompt "
        f"'{prompts[place]}'; scores must be finite."
      )
    return scores

  def try_on(self, prompts: Sequence[str], records: Sequence[Record], resolution: int) -> None:
    """Scores a gray image for each prompt. Raises UserError as `score` does."""
    images = np.full((len(records), resolution, resolution, 3), GRAY, np.uint8)
    self.score(prompts, images, records)
