"""What is generated for a request: the ids of a sample, and what is known of them."""

# G tokens, C codes.

import dataclasses

from jaxtyping import Float, Float32, Int32
import numpy as np

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import TokenMethod
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class Result:
  """One generated sample, or its tokens so far.

  Attributes:
    request: index of its request.
    sample: number of the sample among those of the request.
    seed: its seed.
    tokens: ids generated after the prompt.
    log_probs: of each id under the guided distribution, before temperature and filters.
    contrastive: whether contrastive decoding was used.
    divergence: mean over the image codes of KL(conditional || unconditional) in nats; None without
      image codes, or without an unconditional stream.
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
    method: TokenMethod,
    tokens: Int32[np.ndarray, " G"],
    log_probs: Float32[np.ndarray, " G"],
    divergence: Float[np.ndarray, ""] | np.floating | float,
    streams: int,
    vocab: VocabLayout,
  ) -> "Result":
    """Makes the result of a sample from the arrays of its row.

    Args:
      place: index of the request, and number of the sample.
      seed: of the sample.
      method: by which it was sampled.
      tokens: without padding, see `cut`.
      log_probs: of the tokens.
      divergence: sum over the image codes, see `loop.LoopState`.
      streams: number of guidance streams.
      vocab: kinds of the ids.
    """
    codes = int(vocab.is_image(tokens).sum()) if streams > 1 else 0
    mean = float(divergence) / codes if codes else None
    return cls(*place, seed, tokens, log_probs, method is CONTRASTIVE, mean)

  def codes(self, vocab: VocabLayout) -> Int32[np.ndarray, " C"]:
    """Returns the image codes among the tokens."""
    return vocab.image_codes(self.tokens[vocab.is_image(self.tokens)])


def cut(
  ids: Int32[np.ndarray, " _"], log_probs: Float32[np.ndarray, " _"], pad: int
) -> tuple[Int32[np.ndarray, " G"], Float32[np.ndarray, " G"]]:
  """Returns the tokens of a row and their log-probabilities without the padding after them.

  ids = [7 8 0 0], pad = 0: [7 8] and the first two log-probabilities
  """
  count = int((ids != pad).sum())
  return ids[:count], log_probs[:count]


def sample_seed(seed: int, sample: int) -> int:
  """Returns the seed of a request's n-th sample; the first sample has the request's own seed."""
  return seed if sample == 0 else int(np.random.SeedSequence([seed, sample]).generate_state(1)[0])
