"""Implements a mixture of top-p and contrastive decoding (CM3Leon, section 3.1)."""

import numpy as np

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import SamplingMethod, TokenMethod
from cm3leon_jax.decoding.sampling.top_p import TOP_P


class MixtureMethod(SamplingMethod):
  """Each sample uses top-p or contrastive decoding, with equal probability."""

  name = "mixture"
  settings = (*TOP_P.settings, *CONTRASTIVE.settings)
  needs_unconditional = True

  @property
  def members(self) -> tuple[TokenMethod, ...]:
    return (TOP_P, CONTRASTIVE)

  def choose(self, seed: int) -> TokenMethod:
    """Chooses by a bit of the seed's hash, because all seeds of a user may have one parity.

    seeds 0 to 9: methods 0 1 1 1 0 1 0 0 1 0
    """
    return self.members[np.random.SeedSequence(seed).generate_state(1)[0] % 2]


MIXTURE = MixtureMethod()
