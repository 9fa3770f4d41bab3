"""Keeps compiled programs in a folder, so that later processes do not compile them again."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
import pathlib
import platform
import sys
import tempfile

from etils import epath, epy

from cm3leon_jax.errors import UserError
from cm3leon_jax.files import locks
from cm3leon_jax.files.digests import digest, digest_of_json
from cm3leon_jax.files.json_files import read_json, write_json

with epy.lazy_imports():
  import jax
  from jax.experimental.compilation_cache import compilation_cache

DIGESTS = "digests.json"  # Maps the name of each program's file to its SHA-256.
LOCK = "lock"  # File that a process locks while it reads or changes the folder.
MOST_BYTES = 2**28  # Of the programs of a machine; the oldest are deleted.
CPU = pathlib.Path("/proc/cpuinfo")


@contextlib.contextmanager
def kept(given: str | None = None) -> Iterator[Callable[[], object]]:
  """Makes JAX keep all compiled programs of the body, also those that compile in a second.

  JAX uses a copy of the folder, because it writes files in place while other processes may read
  them. Yields a function that stores new programs in the folder, as the end of the body does.

  Args:
    given: value of --cache_dir: the folder, "" for none, None for the default folder.
  """
  folder = _folder(given)
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
    copy = epath.Path(name)
    if folder is None or not _exchange(folder, copy):
      yield lambda: None
      return
    _use(copy)
    try:
      yield functools.partial(_exchange, folder, copy)
    finally:
      _exchange(folder, copy)
      _use(None)


def _use(folder: epath.Path | None) -> None:
  jax.config.update("jax_compilation_cache_dir", folder and str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  # On GPUs, the path of XLA's own caches, which differs between processes, would be in the key.
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  compilation_cache.reset_cache()


def _exchange(folder: epath.Path, copy: epath.Path) -> bool:
  """Copies new programs in both directions. Prints a warning and returns False if it cannot.

  JAX does not check all bytes of a file: a changed program could crash or be wrong. Therefore files
  without the right digest, such as those of a killed process, are deleted.
  """
  try:
    folder.mkdir(0o700, parents=True, exist_ok=True)
    with locks.alone(folder / LOCK):
      known: dict[str, str | None] = {}
      with contextlib.suppress(UserError):  # No program was kept, or the file is damaged.
        known = read_json(folder / DIGESTS, {})
      for path in folder.glob("*-cache"):
        if digest(path) != known.get(path.name):
          path.unlink()
        elif not (copy / path.name).exists():
          path.copy(copy / path.name)
      for path in copy.glob("*-cache"):
        if not (folder / path.name).exists():
          known[path.name] = digest(path.copy(folder / path.name))
      left = MOST_BYTES
      for path in sorted(folder.glob("*-cache"), key=lambda path: -path.stat().mtime):
        left -= path.stat().length
        if left < 0:
          path.unlink()
          (copy / path.name).unlink(missing_ok=True)  # Otherwise it would be stored again.
      write_json(folder / DIGESTS, {k: v for k, v in known.items() if (folder / k).exists()})
  except OSError as error:
    reason = f"{folder} cannot be used ({error.strerror or error}): name another --cache_dir."
    print(f"warning: compiled programs are not kept, because {reason}", file=sys.stderr)
    return False
  return True


def _folder(given: str | None) -> epath.Path | None:
  """Returns the folder of this machine's programs, or None if JAX has its own folder, or none.

  JAX does not check the instruction set, on which programs for CPUs depend. Therefore each
  instruction set has a folder.
  """
  if given == "":
    jax.config.update("jax_compilation_cache_dir", None)
  if given == "" or (given is None and jax.config.jax_compilation_cache_dir):
    return None
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return epath.Path(given or f"{root}/cm3leon_jax/programs").expanduser() / machine()


def machine() -> str:
  """Returns a digest of the processor's model and instruction sets."""
  lines = CPU.read_text().splitlines() if CPU.exists() else [platform.processor()]
  kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  return digest_of_json(sorted(kinds or lines))[:8]
