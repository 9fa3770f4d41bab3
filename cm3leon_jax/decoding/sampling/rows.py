"""From logits to tokens: the settings of each row of a batch, and how its next token is sampled."""

# B rows, V vocabulary (or the part of it that is legal), C candidates that top-k keeps.

import collections
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key
import numpy as np

from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.sampling.method import StreamLogits, TokenMethod
from cm3leon_jax.decoding.sampling.methods import METHODS, OTHERS
from cm3leon_jax.decoding.sampling.top_p import TEXT_SETTINGS, TOP_P, TopPRows

# By the name of each of OTHERS: the rows that use it.
Uses: TypeAlias = dict[str, Bool[Array, " B"]]
_BY_NAME = {method.name: method for method in OTHERS}
# Each once: methods may share a field.
NUMBERS = dict.fromkeys((*TOP_P.numbers, *TEXT_SETTINGS, *(x for m in OTHERS for x in m.numbers)))


_namedtuple: Any = collections.namedtuple  # To a type checker: it reads fields of literals alone.
_Numbers: Any = _namedtuple("SamplingValues", NUMBERS)


class SamplingValues(_Numbers):
  """Numbers of a SamplingConfig that are traced: other values do not compile again.

  They are those of all rows, or arrays with one number for each row: int32 or fp32, as in the
  config. The fields are the `numbers` of all methods, and those of texts.
  """

  __slots__ = ()

  @classmethod
  def of(cls, config: SamplingConfig) -> "SamplingValues":
    """Returns the traced numbers of a config."""
    values = (getattr(config, field) for field in cls._fields)
    return cls(*(np.asarray(x, np.int32 if isinstance(x, int) else np.float32) for x in values))


class Sampler(NamedTuple):
  """Fields of a `SamplingConfig` that are compiled into the program.

  Attributes:
    of_codes: candidates where only image codes are sampled, as in `filter_candidates`.
    of_all: candidates where texts are sampled, too.
    others: methods beside top-p that a row may use, each its name and its `compiled`.
  """

  of_codes: int
  of_all: int
  others: tuple[tuple[str, Hashable], ...] = ()

  @classmethod
  def of(cls, config: SamplingConfig) -> "Sampler":
    """Returns the compiled settings of a config."""
    members = [method for method in METHODS[config.method].members if method is not TOP_P]
    return cls(*TOP_P.compiled(config), tuple((m.name, m.compiled(config)) for m in members))

  def for_streams(self, count: int) -> "Sampler":
    """Returns it without methods that have no unconditional stream if there is one stream."""
    kept = [x for x in self.others if count > 1 or not METHODS[x[0]].needs_unconditional]
    return self._replace(others=tuple(kept))


class RowSettings(NamedTuple):
  """Settings by which each row samples its token.

  Attributes:
    temperature: divides the logits, or the scores of the row's method.
    top_p: of rows that use top-p.
    others: by the name of each of OTHERS: the rows that use it, and their settings.
  """

  temperature: Float32[Array, " B"]
  top_p: TopPRows
  others: dict[str, tuple[Bool[Array, " B"], Any]]


def uses_of(methods: Sequence[TokenMethod]) -> dict[str, Bool[np.ndarray, " B"]]:
  """Returns which rows use each of OTHERS, if row i uses the i-th of `methods`."""
  return {other.name: np.array([other is method for method in methods], bool) for other in OTHERS}


def select(is_image: Bool[Array, " B"], uses: Uses, values: SamplingValues) -> RowSettings:
  """Selects the settings of rows that sample an image token or a text token next.

  Args:
    is_image: whether a row samples an image token.
    uses: rows whose image tokens are sampled by other methods than top-p.
    values: numbers of the rows.
  """
  used = {method.name: uses[method.name] & is_image for method in OTHERS}
  temperature = jnp.where(is_image, values.temperature, values.text_temperature)
  for method in OTHERS:
    own = getattr(values, method.temperature)
    temperature = jnp.where(used[method.name], own, temperature)
  top_p = TOP_P.rows(is_image, values)
  others = {m.name: (used[m.name], m.rows(is_image, values)) for m in OTHERS}
  return RowSettings(temperature, top_p, others)


def sample(
  logits: StreamLogits,
  keys: Key[Array, " B"],
  rows: RowSettings,
  candidates: int,
  others: Sequence[tuple[str, Hashable]] = (),
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """Samples one id for each row, which has a legal one.

  Args:
    logits: of the streams.
    keys: of the rows: the sample of a row does not depend on the other rows.
    rows: settings of each row.
    candidates: as in `filter_candidates`, static.
    others: of `Sampler`, static.

  Returns:
    (ids, log-probability of each id under softmax(guided), that is before temperature, filters and
    other methods).
  """
  temperature = rows.temperature[:, None]
  token = TOP_P.sample(logits, keys, temperature, rows.top_p, candidates)
  for name, compiled in others:
    used, settings = rows.others[name]
    other = _BY_NAME[name].sample(logits, keys, temperature, settings, compiled)
    token = jnp.where(used, other, token)
  pick = jax.vmap(lambda row, i: row[i])
  return token, pick(jax.nn.log_softmax(logits.guided, axis=-1), token)
