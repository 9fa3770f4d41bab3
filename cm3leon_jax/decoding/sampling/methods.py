"""All sampling methods by name, and what they have in common."""

from collections.abc import Sequence

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import SamplingMethod, TokenMethod
from cm3leon_jax.decoding.sampling.mixture import MIXTURE
from cm3leon_jax.decoding.sampling.top_p import TOP_P

METHODS: dict[str, SamplingMethod] = {
  method.name: method for method in (TOP_P, CONTRASTIVE, MIXTURE)
}
# Every program has top-p, by which texts are sampled; the others only if a row may use them.
OTHERS: tuple[TokenMethod, ...] = tuple(
  method for method in METHODS.values() if isinstance(method, TokenMethod) and method is not TOP_P
)


def settings_of_codes(*, unconditional: bool) -> tuple[str, ...]:
  """Returns the fields of SamplingConfig that tasks read which generate image codes.

  Guidance is not among them: its fields depend on the streams.

  Args:
    unconditional: whether a task may have a stream without its prompt.
  """
  first, *others = (m for m in METHODS.values() if unconditional or not m.needs_unconditional)
  fields = [*first.settings]
  if others:
    fields.append("method")
  for method in others:
    fields += [field for field in method.settings if field not in fields]
  return tuple(fields)


def unread_settings(name: str) -> tuple[str, ...]:
  """Returns the fields of `settings_of_codes` that the method `name` does not read."""
  read = {"method", *METHODS[name].settings}
  return tuple(x for x in settings_of_codes(unconditional=True) if x not in read)


def without_unconditional() -> list[str]:
  """Returns the names of the methods that need no unconditional stream."""
  return [name for name, method in METHODS.items() if not method.needs_unconditional]


def choose_methods(
  name: str, seeds: Sequence[int], samples: int, streams: Sequence[int]
) -> list[list[TokenMethod]]:
  """Chooses the method of every sample of each prompt.

  Without an unconditional stream, a sample uses top-p.

  Args:
    name: of the method.
    seeds: of each prompt.
    samples: of a prompt.
    streams: of each prompt, the number of its streams.
  """
  members = METHODS[name].members

  def usable(method: TokenMethod, count: int) -> TokenMethod:
    return TOP_P if method.needs_unconditional and count == 1 else method

  return [
    [usable(members[i], count) for i in row]
    for row, count in zip(METHODS[name].choose(seeds, samples), streams)
  ]
