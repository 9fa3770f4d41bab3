import pathlib

from absl import flags
from absl.testing import flagsaver
import jax
import pytest

from cm3leon_jax.commands import program_cache


@pytest.fixture
def keep(tmp_path, monkeypatch):
  """Returns a function that keeps programs, given by name, and returns the names of older ones."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)

  def call(*programs, cache_dir=None):
    with flagsaver.flagsaver(cache_dir=cache_dir), program_cache.kept():
      found, folder = set(), jax.config.jax_compilation_cache_dir
      jax.config.update("jax_compilation_cache_dir", None)
      if folder:
        found = {path.name for path in pathlib.Path(folder).glob("*-cache")}
        for name in programs:
          (pathlib.Path(folder) / f"{name}-cache").write_bytes(b"program of " + name.encode())
      return folder and pathlib.Path(folder), found

  yield call
  for name, value in before.items():
    jax.config.update(name, value)


def test_only_programs_that_were_not_changed_since_are_used(keep, tmp_path):
  folder, found = keep("a", "b", "c")
  assert (folder.parent, found) == (tmp_path / "cm3leon_jax" / "programs", set())
  (folder / "a-cache").write_bytes(b"pro")
  (folder / "b-cache").write_bytes(b"Program of b")
  (folder / "killed-cache").write_bytes(b"program of")
  assert keep("d") == (folder, {"c-cache"})
  assert keep() == (folder, {"c-cache", "d-cache"})
  (folder / program_cache.DIGESTS).write_text('{"c-cache": ')
  assert keep() == (folder, set())


def test_each_instruction_set_has_its_programs(keep, tmp_path, monkeypatch):
  folders = []
  for flag in ("avx2", "avx2 avx512f"):
    (tmp_path / "cpuinfo").write_text(
      f"model name\t: A\nflags\t\t: {flag}\ncpu MHz\t\t: {id(flag)}\n"
    )
    monkeypatch.setattr(program_cache, "CPU", tmp_path / "cpuinfo")
    folder, found = keep("a")
    assert not found
    folders.append(folder)
  assert folders[0] != folders[1]


def test_a_folder_that_cannot_be_used_is_a_warning_and_none_may_be_used(keep, tmp_path, capsys):
  (tmp_path / "file").touch()
  assert keep(cache_dir=str(tmp_path / "file")) == (None, set())
  assert "warning: " in (printed := capsys.readouterr().err)
  assert "--cache_dir" in printed
  assert keep(cache_dir="") == (None, set())
  jax.config.update("jax_compilation_cache_dir", "of_the_variable")
  with program_cache.kept():
    assert jax.config.jax_compilation_cache_dir == "of_the_variable"
  assert not capsys.readouterr().err
