"""Samples the next token of each row of a batch from logits, with settings per row."""

# B rows, V vocabulary (all ids, or only image codes), C candidates that top-k keeps.

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

# Name of each method in OTHERS -> mask of the rows that use it.
Uses: TypeAlias = dict[str, Bool[Array, " B"]]
_BY_NAME = {method.name: method for method in OTHERS}
# Field names without duplicates, since methods may share a field.
NUMBERS = dict.fromkeys((*TOP_P.numbers, *TEXT_SETTINGS, *(x for m in OTHERS for x in m.numbers)))


_namedtuple: Any = collections.namedtuple  # Typed as Any: type checkers accept only literal fields.
_Numbers: Any = _namedtuple("SamplingValues", NUMBERS)


class SamplingValues(_Numbers):
  """Numbers of a SamplingConfig that are traced, so that new values do not cause recompilation.

  Each field is a scalar for all rows, or an array with one number per row (int32 or fp32). The
  fields are the `numbers` of all methods and the settings of texts.
  """

  __slots__ = ()

  @classmethod
  def of(cls, config: SamplingConfig) -> "SamplingValues":
    """Returns the traced numbers of a config."""
    values = (getattr(config, field) for field in cls._fields)
    return cls(*(np.asarray(x, np.int32 if isinstance(x, int) else np.float32) for x in values))


class Sampler(NamedTuple):
  """Settings of a `SamplingConfig` that are compiled into the program.

  Attributes:
    of_codes: number of candidates (see `filter_candidates`) if only image codes are sampled.
    of_all: number of candidates if texts may be sampled, too.
    others: methods other than top-p that a row may use, as pairs (name, result of `compiled`).
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
    """Removes the methods that need an unconditional stream if the number of streams is 1."""
    kept = [x for x in self.others if count > 1 or not METHODS[x[0]].needs_unconditional]
    return self._replace(others=tuple(kept))


class RowSettings(NamedTuple):
  """Settings with which each row samples its next token.

  Attributes:
    temperature: divisor of the logits, or of the scores of the row's method.
    others: name of each method in OTHERS -> (mask of the rows that use it, its settings).
  """

  temperature: Float32[Array, " B"]
  top_p: TopPRows
  others: dict[str, tuple[Bool[Array, " B"], Any]]


def uses_of(methods: Sequence[TokenMethod]) -> dict[str, Bool[np.ndarray, " B"]]:
  """Returns, for each method in OTHERS, a mask of the rows that use it. Row i uses `methods[i]`."""
  return {other.name: np.array([other is method for method in methods], bool) for other in OTHERS}


def select(is_image: Bool[Array, " B"], uses: Uses, values: SamplingValues) -> RowSettings:
  """Selects the settings for the next token of each row.

  `is_image` marks the rows whose next token is an image code. `uses` marks the rows that sample
  image codes with a method other than top-p.
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
  """Samples one id for each row. Each row must have at least one legal id.

  `keys` has one key per row, so the sample of a row does not depend on other rows. `candidates` is
  as in `filter_candidates`, and `others` as in `Sampler`; both are static. Returns (ids,
  log-probability of each id under softmax(guided) before temperature and filters).
  """
  temperature = rows.temperature[:, None]
  token = TOP_P.sample(logits, keys, temperature, rows.top_p, candidates)
  for name, compiled in others:
    used, settings = rows.others[name]
    other = _BY_NAME[name].sample(logits, keys, temperature, settings, compiled)
    token = jnp.where(used, other, token)
  pick = jax.vmap(lambda row, i: row[i])
  return token, pick(jax.nn.log_softmax(logits.guided, axis=-1), token)
