import dataclasses
import os
import pathlib
import signal

import pytest

from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.stages.shards import Runner, forget, run_shards
from tests.refusals import refused

NAMES = {f"{i:02d}": {"digest": i} for i in range(12)}


@dataclasses.dataclass(frozen=True)
class Copy:
  """Writes the name of each shard to its file, and a line to a log each time."""

  folder: str
  wrong: str = ""
  error: type[Exception] = UserError
  kill_once: str = ""

  def open(self):
    folder = pathlib.Path(self.folder)
    with (folder / "opened").open("a") as file:
      file.write(f"{os.getpid()}\n")

    def do(name):
      if name == self.wrong:
        raise self.error(f"shard {name} is wrong.")
      with (folder / "log").open("a") as file:
        file.write(f"{name}\n")
      if name == self.kill_once and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
      (folder / f"{name}.out").write_text(name)
      return {"length": len(name)}

    return do


def run(folder, job=None, names=NAMES, runner=Runner()):  # noqa: B008
  return dict(run_shards(job or Copy(str(folder)), names, folder / "done", runner, "test"))


def log(folder):
  return (folder / "log").read_text().split()


def test_every_shard_is_done_once(tmp_path):
  results = run(tmp_path)
  assert results == {name: {"length": 2} for name in NAMES}
  assert log(tmp_path) == list(NAMES)
  assert len((tmp_path / "opened").read_text().split()) == 1
  assert run(tmp_path) == results
  assert log(tmp_path) == list(NAMES)


def test_only_changed_shards_are_done_again(tmp_path):
  run(tmp_path)
  run(tmp_path, names={**NAMES, "03": {"digest": 33}, "99": {"digest": 99}})
  assert log(tmp_path)[len(NAMES) :] == ["03", "99"]


def test_a_shard_whose_files_are_gone_is_done_again(tmp_path):
  run(tmp_path)
  (tmp_path / "03.out").unlink()

  def is_whole(name):
    return (tmp_path / f"{name}.out").exists()

  done, job = tmp_path / "done", Copy(str(tmp_path))
  assert len(dict(run_shards(job, NAMES, done, Runner(), "test", is_whole))) == len(NAMES)
  assert log(tmp_path)[len(NAMES) :] == ["03"]
  forget(done, ["05"])
  run(tmp_path)
  assert log(tmp_path)[len(NAMES) :] == ["03", "05"]


@pytest.mark.parametrize("error", [UserError, TryAgain])
def test_what_was_done_before_an_error_stays_done(tmp_path, error):
  with refused(error, "05", "shard"):
    run(tmp_path, Copy(str(tmp_path), wrong="05", error=error))
  assert log(tmp_path) == [f"{i:02d}" for i in range(5)]
  run(tmp_path)
  assert log(tmp_path) == list(NAMES)
