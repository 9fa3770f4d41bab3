"""Lists all sampling methods by name and chooses the method of each sample."""

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import SamplingMethod, TokenMethod
from cm3leon_jax.decoding.sampling.mixture import MIXTURE
from cm3leon_jax.decoding.sampling.top_p import TOP_P

METHODS: dict[str, SamplingMethod] = {
  method.name: method for method in (TOP_P, CONTRASTIVE, MIXTURE)
}
# All programs contain top-p, which samples texts. They contain another method only if a row may use
# it.
OTHERS: tuple[TokenMethod, ...] = tuple(
  method for method in METHODS.values() if isinstance(method, TokenMethod) and method is not TOP_P
)


def settings_of_codes(*, unconditional: bool) -> tuple[str, ...]:
  """Returns the fields of SamplingConfig that a task reads if it generates image codes.

  Guidance fields are not included, because they depend on the streams. `unconditional` is whether
  the task may have an unconditional stream.
  """
  first, *others = (m for m in METHODS.values() if unconditional or not m.needs_unconditional)
  fields = [*first.settings]
  if others:
    fields.append("method")
  for method in others:
    fields += [field for field in method.settings if field not in fields]
  return tuple(fields)


def unread_settings(name: str) -> tuple[str, ...]:
  """Returns the fields in `settings_of_codes` that the method `name` does not read."""
  read = {"method", *METHODS[name].settings}
  return tuple(x for x in settings_of_codes(unconditional=True) if x not in read)


def without_unconditional() -> list[str]:
  """Returns the names of the methods that do not need an unconditional stream."""
  return [name for name, method in METHODS.items() if not method.needs_unconditional]


def choose_method(name: str, seed: int, streams: int) -> TokenMethod:
  """Chooses the token method of the sample with the seed `seed`.

  A prompt with one stream uses top-p if the chosen method needs an unconditional stream. `streams`
  is the number of streams of the prompt.
  """
  method = METHODS[name].choose(seed)
  return TOP_P if method.needs_unconditional and streams == 1 else method
