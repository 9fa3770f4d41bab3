"""Defines the result of a request: token ids, log-probabilities and divergence of a sample."""

# G tokens, C codes.

import dataclasses

from jaxtyping import Float, Float32, Int32
import numpy as np

from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class Result:
  """Generated tokens of one sample; the sample may be unfinished.

  Attributes:
    sample: index of the sample among all samples of the request.
    tokens: ids generated after the prompt.
    log_probs: log-probability of each id under the guided distribution, before temperature and
      filters.
    divergence: mean over the image codes of KL(conditional || unconditional) in nats. None if there
      is no image code or no unconditional stream.
  """

  request: int
  sample: int
  seed: int
  tokens: Int32[np.ndarray, " G"]
  log_probs: Float32[np.ndarray, " G"]
  contrastive: bool
  divergence: float | None = None

  @classmethod
  def of(
    cls,
    place: tuple[int, int],
    seed: int,
    contrastive: bool,
    tokens: Int32[np.ndarray, " G"],
    log_probs: Float32[np.ndarray, " G"],
    divergence: Float[np.ndarray, ""] | np.floating | float,
    streams: int,
    vocab: VocabLayout,
  ) -> "Result":
    """Makes the result of a sample from the arrays of its row.

    `place` is (index of the request, index of the sample). `tokens` has no padding (see `cut`).
    `divergence` is the sum over the image codes; see `loop.LoopState`. `streams` is the number of
    guidance streams.
    """
    codes = int(vocab.is_image(tokens).sum()) if streams > 1 else 0
    mean = float(divergence) / codes if codes else None
    return cls(*place, seed, tokens, log_probs, contrastive, mean)

  def codes(self, vocab: VocabLayout) -> Int32[np.ndarray, " C"]:
    """Returns the image codes among the tokens."""
    return vocab.image_codes(self.tokens[vocab.is_image(self.tokens)])


def cut(
  ids: Int32[np.ndarray, " _"], log_probs: Float32[np.ndarray, " _"], pad: int
) -> tuple[Int32[np.ndarray, " G"], Float32[np.ndarray, " G"]]:
  """Removes the padding after a row's tokens and log-probabilities.

  ids = [7 8 0 0], pad = 0: [7 8] and the first two log-probabilities
  """
  count = int((ids != pad).sum())
  return ids[:count], log_probs[:count]


def sample_seed(seed: int, sample: int) -> int:
  """Returns the seed of a sample of a request. Sample 0 has the seed of the request."""
  return seed if sample == 0 else int(np.random.SeedSequence([seed, sample]).generate_state(1)[0])
