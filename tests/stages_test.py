import contextlib

import numpy as np
import pytest

from cm3leon_jax import stages
from cm3leon_jax.config import UserError


def test_a_finished_stage_is_skipped(tmp_path):
  with stages.stage(tmp_path / "a", {"n": 1}) as summary:
    summary["value"] = 3.0
  first = stages.require(tmp_path / "a", "make_a")
  assert first["summary"] == {"value": 3.0}
  assert first["config"] == {"n": 1}
  with stages.stage(tmp_path / "a", {"n": 1}) as summary:
    assert summary is None
  assert stages.require(tmp_path / "a", "make_a") == first


def test_redo_runs_again_under_a_new_id(tmp_path):
  ids = []
  for _ in range(2):
    with stages.stage(tmp_path, {"n": 1}, redo=True) as summary:
      assert summary == {}
    ids.append(stages.require(tmp_path, "make_a")["id"])
  assert ids[0] != ids[1]


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
  with stages.stage(tmp_path, {"model": {"width": 8, "depth": 2}}):
    pass
  with (
    pytest.raises(UserError, match=r"model.width: 8 -> 16"),
    stages.stage(tmp_path, {"model": {"width": 16, "depth": 2}}),
  ):
    pytest.fail("the body must not run")


def test_a_stage_that_fails_is_not_finished(tmp_path):
  with pytest.raises(RuntimeError), stages.stage(tmp_path, {}):
    raise RuntimeError
  with pytest.raises(UserError, match=r"run `python -m launch\.make_a`"):
    stages.require(tmp_path, "make_a")


def test_configs_compare_as_json(tmp_path):
  with stages.stage(tmp_path, {"shape": (1, 2), "n": np.int64(3)}):
    pass
  with stages.stage(tmp_path, {"shape": [1, 2], "n": 3}) as summary:
    assert summary is None


def test_differences_literal():
  assert stages.differences(
    {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
  ) == [
    "b.c: 2 -> 4",
    "e: None -> 5",
  ]


def test_of_a_jobs_processes_one_writes_and_all_read_first(tmp_path, capsys):
  read = []

  @contextlib.contextmanager
  def together():
    yield
    read.append((tmp_path / stages.DONE).exists())

  for writes in (False, True):
    with stages.stage(tmp_path, {"a": 1}, writes=writes, together=together) as summary:
      summary["steps"] = 5
    assert (tmp_path / stages.DONE).exists() == writes
  with stages.stage(tmp_path, {"a": 1}, writes=False) as summary:
    assert summary is None
  assert capsys.readouterr().out == ""
  with stages.stage(tmp_path, {"a": 1}, redo=True, writes=False, together=together):
    assert (tmp_path / stages.DONE).exists()
  with stages.stage(tmp_path, {"a": 1}, redo=True, together=together):
    assert not (tmp_path / stages.DONE).exists()
  assert read == [False, False, True, True]
