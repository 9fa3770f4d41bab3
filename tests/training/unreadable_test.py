"""Tests that a message names an unreadable checkpoint file, and that nothing is deleted."""

import builtins
import contextlib
import errno
import io
import os
import pathlib

import pytest

from cm3leon_jax.errors import TryAgain
from cm3leon_jax.weights import checkpoint, recovery
from tests.refusals import refused
from tests.weights.saved import largest_file, on_disk

# Errors of a network disk, and of too many open files.
ERRORS = ("EIO", "EMFILE")


class Unreadable(io.RawIOBase):
  """File that can be opened but not read."""

  def __init__(self, number: int):
    self._number = number

  def readable(self):
    return True

  def readinto(self, _):
    raise OSError(self._number, os.strerror(self._number))


@contextlib.contextmanager
def failing(call: str, number: int, path):
  """Makes one system call fail for one path: `stat`, `open`, `read` or, for a folder, `list`."""
  with pytest.MonkeyPatch.context() as patch:

    def wrapped(original):
      def fails(name, *args, **options):
        if not isinstance(name, int) and os.fspath(name) == str(path):
          if call != "read":
            raise OSError(number, os.strerror(number), os.fspath(name))
          file = io.BufferedReader(Unreadable(number))
          return file if "b" in (args[0] if args else "") else io.TextIOWrapper(file)
        return original(name, *args, **options)

      return fails

    for module, name in {
      "stat": [(os, "stat")],
      "open": [(builtins, "open")],
      "read": [(builtins, "open")],
      "list": [(os, "listdir"), (os, "scandir")],
    }[call]:
      patch.setattr(module, name, wrapped(getattr(module, name)))
    yield


def below(folder) -> list[pathlib.Path]:
  return sorted(folder.rglob("*"))


def contents(folder) -> dict[str, bytes]:
  return {str(p): p.read_bytes() for p in below(folder) if p.is_file()}


def recover(checkpoints):
  """Checks checkpoints as a start does before it restores one."""
  recovery.discard_unsealed(checkpoints)
  return recovery.newest_whole(checkpoints)


@pytest.mark.parametrize("name", ERRORS)
def test_a_file_that_cannot_be_read_is_named_and_nothing_is_deleted(saved, name):
  """Covers each file and folder of the newest checkpoint, its digests, and each system call."""
  number, before, tried = getattr(errno, name), contents(saved), 0
  digests = saved / "checkpoints.digests" / "2.json"
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    for path in [digests, *below(saved / "checkpoints" / "2")]:
      for call in ("stat", "open", "read") if path.is_file() else ("stat", "list"):
        with failing(call, number, path), pytest.raises(TryAgain) as error:
          recover(checkpoints)
        assert str(path) in str(error.value)
        assert "nothing was deleted" in str(error.value)
        assert error.value.exit_code == 1
        tried += 1
    assert contents(saved) == before
    assert tried > 30
    assert recovery.newest_whole(checkpoints) == 2


@pytest.mark.parametrize("call", ["stat", "list"])
def test_checkpoints_that_cannot_be_listed_are_not_gone(saved, call):
  """Orbax treats an unreadable folder as missing."""
  before = contents(saved)
  path = saved / "checkpoints" / ("2" if call == "stat" else "")
  with failing(call, errno.EIO, path), refused(TryAgain, str(path).rstrip("/")):
    checkpoint.Checkpoints(saved, keep=2)
  assert contents(saved) == before


def test_a_folder_that_only_orbax_could_not_read_is_not_gone(saved, monkeypatch):
  all_steps = checkpoint.ocp.CheckpointManager.all_steps
  monkeypatch.setattr(
    checkpoint.ocp.CheckpointManager, "all_steps", lambda self: all_steps(self)[:-1]
  )
  with refused(TryAgain, str(saved), "nothing was deleted"):
    checkpoint.Checkpoints(saved, keep=2)
  assert on_disk(saved) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("how", ["cut", "folder", "surplus", "broken link"])
def test_what_was_read_and_differs_is_still_damage(saved, how, capsys):
  path = largest_file(saved / "checkpoints" / "2")
  if how == "cut":
    path.write_bytes(path.read_bytes()[:-1])
  elif how == "surplus":
    (path.parent / "surplus").write_bytes(b"")
  else:
    path.unlink()
    if how == "folder":
      path.mkdir()
    elif how == "broken link":
      path.symlink_to(saved / "nowhere")
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    assert recovery.newest_whole(checkpoints) == 1
  assert "is damaged" in capsys.readouterr().out
  assert on_disk(saved) == [[1], [1]]
