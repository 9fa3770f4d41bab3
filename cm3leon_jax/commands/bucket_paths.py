"""Checks the cloud paths in the flags and the config of a command."""

from collections.abc import Iterator, Mapping
import importlib.util

from absl import flags

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.files import buckets

NEEDS_GCSFS = f"needs gcsfs: {extras.install('data')}."


def _strings(value: object, name: str = "") -> Iterator[tuple[str, str]]:
  """Yields the name and the text of every string in nested mappings and lists."""
  if isinstance(value, str):
    yield name.removesuffix("."), value
  elif isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _strings(inner, f"{name}{key}.")
  elif isinstance(value, list | tuple):
    for inner in value:
      yield from _strings(inner, name)


def _texts() -> list[tuple[str, str]]:
  """Returns the names and values of all flags and config fields that contain strings."""
  values = flags.FLAGS.flag_values_dict()
  given = {f"--{k}": v for k, v in values.items() if k.partition(".")[0] != "config"}
  fields = values["config"].to_dict() if values.get("config") else {}
  return [*_strings(given), *_strings(fields, "config.")]


def check() -> None:
  """Checks the cloud paths in the flags and the config.

  If gcsfs is missing, a GCS path in the config is still allowed, because this command may not need
  the field. For example, training does not read `raw.source`.

  Raises:
    UserError: a path is on S3, or a flag names a GCS path and gcsfs is missing.
  """
  for name, text in _texts():
    buckets.check_path(text, name)
  if importlib.util.find_spec("gcsfs"):
    return
  for name, text in _texts():
    if name.startswith("-") and text.startswith("gs://"):
      raise UserError(f"{name}={text} is in a GCS bucket, which {NEEDS_GCSFS}")


def where() -> str:
  """Returns the GCS buckets that flags or the config name, as a text for messages."""
  found = {"/".join(text.split("/")[:3]) for _, text in _texts() if text.startswith("gs://")}
  return ", ".join(sorted(found)) or "a path in the data"
