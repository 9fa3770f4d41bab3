"""Defines the interface of sampling methods. Each method is an object in its own file."""

# B rows, V vocabulary (all ids, or only image codes).

from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from cm3leon_jax.decoding.config import SamplingConfig


class StreamLogits(NamedTuple):
  """Logits for a sampling method. They are not sharded over V, and illegal ids are -inf.

  Attributes:
    guided: logits of all streams, combined with the guidance weights.
    conditional: logits of the stream with the complete prompt.
    unconditional: logits of the stream without the prompt. With one stream, they equal
      `conditional`.
  """

  guided: Float[Array, "B V"]
  conditional: Float[Array, "B V"]
  unconditional: Float[Array, "B V"]


class SamplingMethod:
  """A method to sample image codes. `methods.METHODS` lists all methods.

  Attributes:
    name: value of `sampling.method` in the config.
    settings: fields of SamplingConfig that the method reads, except `method` and guidance fields.
    is_guided: whether guidance weights have an effect.
  """

  name: ClassVar[str]
  settings: ClassVar[tuple[str, ...]]
  is_guided: ClassVar[bool] = True
  needs_unconditional: ClassVar[bool] = False

  @property
  def members(self) -> tuple["TokenMethod", ...]:
    """The token methods that the samples use; for a `TokenMethod`, only the method itself."""
    raise NotImplementedError

  def choose(self, seed: int) -> "TokenMethod":
    """Chooses the token method of the sample with this seed."""
    return self.members[0]


class TokenMethod(SamplingMethod):
  """A method that samples tokens, unlike a mixture, which only chooses methods.

  The rows of a batch may use different methods. So the program computes the tokens of all methods,
  and each row takes the token of its method.

  Attributes:
    numbers: fields in `settings` that are inputs of the program, so that new values do not cause
      recompilation.
    temperature: field in `numbers` that divides the logits or scores.
  """

  numbers: ClassVar[tuple[str, ...]]
  temperature: ClassVar[str]

  @property
  def members(self) -> tuple["TokenMethod", ...]:
    return (self,)

  def compiled(self, config: SamplingConfig) -> Hashable:
    """Returns the settings that are compiled into the program. They are not in `numbers`."""
    raise NotImplementedError

  def rows(self, is_image: Bool[Array, " B"], values: Any) -> Any:
    """Returns the settings of each row as `sample` reads them.

    `is_image` marks the rows that sample an image code. `values` is a `rows.SamplingValues`.
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
    """Samples one id for each row. The ids for rows of other methods are discarded later.

    `keys` has one key per row, so the sample of a row does not depend on other rows. `rows` is the
    result of `self.rows`, and `compiled` is the result of `self.compiled`.
    """
    raise NotImplementedError
