"""Implements a mixture of top-p and contrastive decoding (CM3Leon, section 3.1)."""

# P prompts, N samples of a prompt.

from collections.abc import Sequence

from jaxtyping import Shaped
import numpy as np

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import SamplingMethod, TokenMethod
from cm3leon_jax.decoding.sampling.top_p import TOP_P


class MixtureMethod(SamplingMethod):
  """Samples alternate between top-p and contrastive decoding."""

  name = "mixture"
  settings = (*TOP_P.settings, *CONTRASTIVE.settings)
  needs_unconditional = True

  @property
  def members(self) -> tuple[TokenMethod, ...]:
    return (TOP_P, CONTRASTIVE)

  def choose(self, seeds: Sequence[int], samples: int) -> Shaped[np.ndarray, "P N"]:
    """Chooses by the index of the sample, or by the seed if a prompt has only one sample.

    seeds 4 and 7, 3 samples of each: [[0 1 0] [0 1 0]]
    seeds 4 and 7, 1 sample of each: [[0] [1]]
    """
    one = np.arange(samples)[None] if samples > 1 else np.asarray(seeds)[:, None]
    return np.broadcast_to(one % 2, (len(seeds), samples))


MIXTURE = MixtureMethod()
