"""The interface of a sampling method: each value of `sampling.method` is one object in one file."""

# B rows, V vocabulary (or the part of it that is legal), P prompts, N samples of a prompt.

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np

from cm3leon_jax.decoding.config import SamplingConfig


class StreamLogits(NamedTuple):
  """What a method may sample from. None of it is split over V, and illegal ids are -inf.

  Attributes:
    guided: of all streams, combined by the weights of guidance.
    conditional: of the stream with the whole prompt alone.
    unconditional: of the stream without the prompt; with one stream, that stream.
  """

  guided: Float[Array, "B V"]
  conditional: Float[Array, "B V"]
  unconditional: Float[Array, "B V"]


class SamplingMethod:
  """A way to sample image codes, as `sampling.method` names it; `methods.METHODS` lists all.

  Attributes:
    name: its name in the config.
    settings: fields of SamplingConfig that it reads, beside `method` and those of guidance.
    is_guided: whether the weights of guidance have an effect.
    needs_unconditional: whether it contrasts with a stream without the prompt.
    takes_drafts: whether it samples from the distribution of `top_p.filter_candidates`, by which
      `speculative` verifies drafts.
  """

  name: ClassVar[str]
  settings: ClassVar[tuple[str, ...]]
  is_guided: ClassVar[bool] = True
  needs_unconditional: ClassVar[bool] = False
  takes_drafts: ClassVar[bool] = False

  @property
  def members(self) -> tuple["TokenMethod", ...]:
    """The methods that its samples use: itself, if it samples tokens."""
    raise NotImplementedError

  def choose(self, seeds: Sequence[int], samples: int) -> Shaped[np.ndarray, "P N"]:
    """Chooses the method of each sample, by its index in `members`.

    Args:
      seeds: of P prompts.
      samples: N.
    """
    return np.zeros((len(seeds), samples), np.int32)


class TokenMethod(SamplingMethod):
  """A method that samples tokens itself.

  The rows of a batch may use different ones, so all of them are computed, and each row takes the
  token of its own.

  Attributes:
    numbers: those of `settings` that are arrays of the program: other values compile nothing.
    temperature: the one of `numbers` that divides logits, or scores.
  """

  numbers: ClassVar[tuple[str, ...]]
  temperature: ClassVar[str]

  @property
  def members(self) -> tuple["TokenMethod", ...]:
    return (self,)

  def compiled(self, config: SamplingConfig) -> Hashable:
    """Returns what the program is compiled for: the values of the other settings."""
    raise NotImplementedError

  def rows(self, is_image: Bool[Array, " B"], values: Any) -> Any:
    """Returns the arrays of the rows that `sample` reads.

    Args:
      is_image: whether a row samples an image token.
      values: `rows.SamplingValues`.
    """
    raise NotImplementedError

  def sample(
    self,
    logits: StreamLogits,
    keys: Key[Array, " B"],
    temperature: Float[Array, "B 1"],
    rows: Any,
    compiled: Any,
  ) -> Int[Array, " B"]:
    """Samples one id for each row, also for rows of other methods, whose ids are not used.

    Args:
      logits: of the streams.
      keys: of the rows: the sample of a row does not depend on the other rows.
      temperature: of the rows, each that of its method.
      rows: of `self.rows`.
      compiled: of `self.compiled`.
    """
    raise NotImplementedError
