"""Tests that compiled programs are stored where the user, the environment or the default says."""

import os

import jax
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.serving import program_cache

NAMES = (
  "jax_compilation_cache_dir",
  "jax_enable_compilation_cache",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def own_config(monkeypatch, tmp_path):
  """Resets JAX's cache settings, and restores them after the test."""
  before = {name: getattr(jax.config, name) for name in NAMES}
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_default_is_the_users_folder_for_caches(tmp_path, monkeypatch):
  assert program_cache.keep_programs(None) == ""
  kept = jax.config.jax_compilation_cache_dir
  assert kept == str(tmp_path / "caches" / "cm3leon_jax" / "programs" / program_cache.machine())
  # Only the user may access the folder: others could plant programs.
  assert os.stat(kept).st_mode & 0o077 == 0
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  for value in ("", "relative/caches"):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/someone")
    assert program_cache.default_folder() == "/home/someone/.cache/cm3leon_jax/programs"


def test_a_folder_that_jax_was_given_stays(monkeypatch):
  jax.config.update("jax_compilation_cache_dir", "/given")
  assert program_cache.keep_programs(None) == ""
  assert jax.config.jax_compilation_cache_dir == "/given"
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


def test_a_flag_names_another_folder_or_none(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
  jax.config.update("jax_compilation_cache_dir", "/given")
  assert program_cache.keep_programs(str(tmp_path / "own")) == ""
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own" / program_cache.machine())
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
  assert program_cache.keep_programs("") == ""
  assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  (tmp_path / "caches").write_text("a file")
  warning = program_cache.keep_programs(None)
  assert warning.startswith("compiled programs are not kept: ")
  assert warning.endswith("(Not a directory); --cache_dir names another folder.")
  assert jax.config.jax_compilation_cache_dir is None
  with pytest.raises(UserError, match=r"--cache_dir=.*caches: .* cannot be written \(Not a dir"):
    program_cache.keep_programs(str(tmp_path / "caches"))


def test_machines_with_other_instructions_have_other_folders(tmp_path, monkeypatch):
  names = set()
  for text in (
    "flags\t\t: avx sse\n",
    "flags\t\t: sse avx\n",
    "flags\t: sse\n",
    "Features : neon\n",
  ):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    monkeypatch.setattr(program_cache, "CPU_FEATURES", tmp_path / "cpuinfo")
    names.add(program_cache.machine())
  assert len(names) == 3
  monkeypatch.setattr(program_cache, "CPU_FEATURES", tmp_path / "absent")
  assert program_cache.machine() not in names
