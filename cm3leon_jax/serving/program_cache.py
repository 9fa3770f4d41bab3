"""Keeps compiled programs in a folder of the user, so that the next start need not compile them."""

import hashlib
import os
import pathlib
import platform
import re

import jax

from cm3leon_jax.config import UserError

CPU_FEATURES = pathlib.Path("/proc/cpuinfo")


def default_folder() -> str:
  """Returns cm3leon_jax/programs in the user's folder for caches ($XDG_CACHE_HOME, ~/.cache)."""
  caches = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(caches):  # So the specification: a relative path is ignored.
    caches = os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(caches, "cm3leon_jax", "programs")


def machine() -> str:
  """Names the machine's kind of CPU: a program for another one may have unknown instructions.

  JAX's key of a program has versions, options and the kind of accelerator, and not the CPU's
  instructions; a home folder may be shared by different machines.
  """
  try:
    features = re.search(r"^(flags|Features)\s*:(.*)$", CPU_FEATURES.read_text(), re.MULTILINE)
  except OSError:
    features = None
  words = " ".join(sorted(features[2].split())) if features else platform.processor()
  digest = hashlib.sha256(words.encode()).hexdigest()[:12]
  return f"{platform.machine() or 'machine'}-{digest}"


def keep_programs(folder: str | None) -> str:
  """Lets JAX keep all programs in a folder from now on; call it before anything is compiled.

  Args:
    folder: None: that of JAX_COMPILATION_CACHE_DIR, else `default_folder`; empty: none.

  Returns:
    A sentence for the user if nothing is kept although no flag asks for that, or "".

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
    raise UserError(f"--cache_dir={folder}: {reason}: name another folder.") from error
  jax.config.update("jax_compilation_cache_dir", kept)
  # JAX keeps programs from one second of compilation on; a start has many smaller ones.
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return ""
