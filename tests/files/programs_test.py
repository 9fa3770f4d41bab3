import contextlib
import os
import pathlib

import jax
import pytest

from cm3leon_jax.files import programs

CHANGED = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_enable_xla_caches",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def process(tmp_path, monkeypatch):
  """Returns a context manager that yields the names of kept programs, and a function that adds one.

  The function then stores all programs, if told.
  """
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = {name: getattr(jax.config, name) for name in CHANGED}
  jax.config.update("jax_compilation_cache_dir", None)

  @contextlib.contextmanager
  def process(cache_dir=None):
    with programs.kept(cache_dir) as store:
      copy = jax.config.jax_compilation_cache_dir
      jax.config.update("jax_compilation_cache_dir", None)

      def add(name, stored=False):
        (pathlib.Path(copy) / f"{name}-cache").write_bytes(b"program of " + name.encode())
        if stored:
          store()

      yield {path.name[:-6] for path in pathlib.Path(copy or "none").glob("*-cache")}, add

  yield process
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture
def keep(process):
  """Returns a function that keeps programs, given by name, and returns the names of older ones."""

  def call(*programs, **options):
    with process(**options) as (found, add):
      for name in programs:
        add(name)
    return found

  return call


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "cm3leon_jax" / "programs" / programs.machine()


def test_only_programs_that_were_not_changed_since_are_used(keep, folder):
  assert keep("a", "b", "c") == set()
  (folder / "a-cache").write_bytes(b"pro")
  (folder / "b-cache").write_bytes(b"Program of b")
  (folder / "killed-cache").write_bytes(b"program of")
  assert keep("d", "a") == {"c"}
  assert keep() == {"a", "c", "d"}
  (folder / programs.DIGESTS).write_text('{"c-cache": ')
  assert keep() == set()


def test_processes_at_the_same_time_keep_their_programs(keep, process):
  with process() as (_, add):
    add("a")
    assert keep("b") == set()  # Another process must not see or delete "a" before it is complete.
    add("c", stored=True)
    assert keep() == {"a", "b", "c"}  # The first process could be killed now.
  assert keep() == {"a", "b", "c"}


def test_the_oldest_programs_go_beyond_the_limit(keep, process, folder, monkeypatch):
  monkeypatch.setattr(programs, "MOST_BYTES", 3 * len("program of a"))
  keep("a", "b", "c")
  for age, name in enumerate("bca"):
    os.utime(folder / f"{name}-cache", (age, age))
  with process() as (found, add):
    assert found == {"a", "b", "c"}
    add("d", stored=True)
  assert keep() == {"a", "c", "d"}


def test_each_instruction_set_has_its_programs(keep, tmp_path, monkeypatch):
  for flag in ("avx2", "avx2 avx512f"):
    (tmp_path / "cpuinfo").write_text(
      f"model name\t: A\nflags\t\t: {flag}\ncpu MHz\t\t: {id(flag)}\n"
    )
    monkeypatch.setattr(programs, "CPU", tmp_path / "cpuinfo")
    assert not keep("a")
    assert keep() == {"a"}


def test_a_folder_that_cannot_be_used_is_a_warning_and_none_may_be_used(keep, tmp_path, capsys):
  (tmp_path / "file").touch()
  assert keep(cache_dir=str(tmp_path / "file")) == set()
  assert "warning: " in (printed := capsys.readouterr().err)
  assert "--cache_dir" in printed
  assert keep(cache_dir="") == set()
  jax.config.update("jax_compilation_cache_dir", "of_the_variable")
  with programs.kept():
    assert jax.config.jax_compilation_cache_dir == "of_the_variable"
  assert not capsys.readouterr().err
