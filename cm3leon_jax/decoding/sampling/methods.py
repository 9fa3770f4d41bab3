"""Lists the settings of each sampling method and chooses the method of each sample.

Texts are always sampled by top-p, and so are codes without an unconditional stream.
"""

import numpy as np

from cm3leon_jax.config.sampling import METHODS

TEXT_SETTINGS = ("text_temperature", "text_top_k", "text_top_p")
_TOP_P = ("temperature", "top_k", "top_p")
_CONTRASTIVE = (
  *("contrastive_k", "contrastive_alpha"),
  *("contrastive_temperature", "amateur_temperature"),
)
# Fields of SamplingConfig that each method reads, except `method` and guidance fields.
SETTINGS = {
  "top_p": _TOP_P,
  "contrastive": _CONTRASTIVE,
  "mixture": (*_TOP_P, *_CONTRASTIVE),
}
assert tuple(SETTINGS) == METHODS
WITHOUT_UNCONDITIONAL = ("top_p",)  # Methods that need no unconditional stream.


def settings_of_codes(*, unconditional: bool) -> tuple[str, ...]:
  """Returns the fields of SamplingConfig that a task reads if it generates image codes.

  Guidance fields are not included, because they depend on the streams. `unconditional` is whether
  the task may have an unconditional stream.
  """
  return (*_TOP_P, "method", *_CONTRASTIVE) if unconditional else _TOP_P


def unread_settings(name: str) -> tuple[str, ...]:
  """Returns the fields in `settings_of_codes` that the method `name` does not read."""
  return tuple(field for field in SETTINGS["mixture"] if field not in SETTINGS[name])


def is_guided(name: str) -> bool:
  """Returns whether guidance weights have an effect on a method."""
  return name != "contrastive"


def is_contrastive(name: str, seed: int, streams: int) -> bool:
  """Returns whether the sample with this seed uses contrastive decoding, and not top-p.

  A mixture chooses with equal probability, by a bit of the seed's hash, because all seeds of a user
  may have one parity.

    seeds 0 to 9: 0 1 1 1 0 1 0 0 1 0

  `streams` is the number of streams of the prompt.
  """
  if name == "mixture":
    chosen = bool(np.random.SeedSequence(seed).generate_state(1)[0] % 2)
  else:
    chosen = name == "contrastive"
  return chosen and streams > 1
