"""Keeps compiled programs in a folder, so that later processes do not compile them again."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import platform
import sys

from absl import flags
from etils import epath, epy

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest, digest_of_json
from cm3leon_jax.files.json_files import read_json, write_json

with epy.lazy_imports():
  import jax

DIGESTS = "digests.json"  # Maps the name of each program's file to its SHA-256.
CPU = pathlib.Path("/proc/cpuinfo")
CACHE_DIR = flags.DEFINE_string(
  "cache_dir",
  None,
  "Folder that keeps compiled programs for the next start; an empty value disables it. Default: "
  "JAX_COMPILATION_CACHE_DIR or, if that is not set, cm3leon_jax/programs in XDG_CACHE_HOME or "
  "~/.cache.",
  allow_override=True,  # Tests import several commands that define this flag.
)


@contextlib.contextmanager
def kept() -> Iterator[None]:
  """Makes JAX keep all compiled programs of the body, also those that compile in a second."""
  folder = _folder()
  if folder is not None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  try:
    yield
  finally:
    if folder is not None:
      seal(folder)


def seal(folder: epath.Path) -> None:
  """Writes the digests of new programs. Prints a warning if the folder cannot be written."""
  try:
    found = {path.name: digest(path) for path in folder.glob("*-cache")}
    write_json(folder / DIGESTS, {**found, **_digests(folder)})
  except OSError as error:
    _warn(folder, error)


def _folder() -> epath.Path | None:
  """Returns the folder of this machine's programs, or None if JAX has its own folder, or none.

  JAX checks neither the instruction set, on which programs for CPUs depend, nor all bytes of a
  file: a changed program could crash or be wrong. Therefore each instruction set has a folder, and
  files without the right digest, such as those of a killed process, are deleted.
  """
  given = CACHE_DIR.value
  if given == "":
    jax.config.update("jax_compilation_cache_dir", None)
  if given == "" or (given is None and jax.config.jax_compilation_cache_dir):
    return None
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = epath.Path(given or f"{root}/cm3leon_jax/programs").expanduser() / machine()
  try:
    folder.mkdir(0o700, parents=True, exist_ok=True)
    known = _digests(folder)
    for path in folder.glob("*-cache"):
      if digest(path) != known.get(path.name):
        path.unlink()
    write_json(folder / DIGESTS, {k: v for k, v in known.items() if (folder / k).exists()})
  except OSError as error:
    _warn(folder, error)
    return None
  return folder


def machine() -> str:
  """Returns a digest of the processor's model and instruction sets."""
  lines = CPU.read_text().splitlines() if CPU.exists() else [platform.processor()]
  kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  return digest_of_json(sorted(kinds or lines))[:8]


def _digests(folder: epath.Path) -> dict[str, str]:
  with contextlib.suppress(UserError):  # No program was kept, or the file is damaged.
    return read_json(folder / DIGESTS, {})
  return {}


def _warn(folder: epath.Path, error: OSError) -> None:
  reason = f"{folder} cannot be used ({error.strerror or error}): name another one in --cache_dir."
  print(f"warning: compiled programs are not kept, because {reason}", file=sys.stderr)
