"""Stores compiled programs in the user's cache folder, so that the next start loads them."""

import hashlib
import os
import pathlib
import platform
import re

import jax

from cm3leon_jax.config import UserError

CPU_FEATURES = pathlib.Path("/proc/cpuinfo")


def default_folder() -> str:
  """Returns cm3leon_jax/programs in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
  caches = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(caches):  # The specification says to ignore a relative path.
    caches = os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(caches, "cm3leon_jax", "programs")


def machine() -> str:
  """Returns a name for the CPU type of this machine.

  A program for another CPU type may use instructions that this CPU lacks. JAX's cache key has
  versions, options and the type of accelerator, but not the instructions of the CPU, and different
  machines may share a home folder.
  """
  try:
    features = re.search(r"^(flags|Features)\s*:(.*)$", CPU_FEATURES.read_text(), re.MULTILINE)
  except OSError:
    features = None
  words = " ".join(sorted(features[2].split())) if features else platform.processor()
  digest = hashlib.sha256(words.encode()).hexdigest()[:12]
  return f"{platform.machine() or 'machine'}-{digest}"


def keep_programs(folder: str | None) -> str:
  """Configures JAX to store all compiled programs in a folder. Call it before any compilation.

  Args:
    folder: folder of the cache. None means JAX_COMPILATION_CACHE_DIR or else `default_folder`; an
      empty text disables the cache.

  Returns:
    A warning for the user if the default folder cannot be used, otherwise "".

  Raises:
    UserError: `folder` is given and cannot be written.
  """
  if folder is None and jax.config.jax_compilation_cache_dir:
    return ""
  if folder == "":
    jax.config.update("jax_enable_compilation_cache", False)
    return ""
  kept = os.path.join(folder or default_folder(), machine())
  try:
    os.makedirs(kept, mode=0o700, exist_ok=True)
    if not os.access(kept, os.W_OK | os.X_OK):
      raise PermissionError(13, "Permission denied")
  except OSError as error:
    reason = f"{kept} cannot be written ({error.strerror or error})"
    if folder is None:
      return f"compiled programs are not kept: {reason}; --cache_dir names another folder."
    raise UserError(f"--cache_dir={folder}: {reason}; name another folder.") from error
  jax.config.update("jax_compilation_cache_dir", kept)
  # By default, JAX stores only programs that compile for at least one second. The server compiles
  # many smaller programs when it starts.
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return ""
