import shutil
from unittest import mock

from etils import epath
import jax
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.saves import upkeep
from cm3leon_jax.weights import checkpoint, reading
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.training.runs import MODEL, Crash, assert_equal, crash_at, losses, run


def test_a_run_that_is_rolled_back_continues_bit_for_bit(whole, loader, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / "done.json").write_text("{}")
  folder = epath.Path(tmp_path)
  assert upkeep.rollback(folder, 8) == [
    f"removed {folder / 'done.json'}: without it the run is not finished, so generate, evaluate "
    "and export use its newest checkpoint, or with train.patience its best one, until cm3leon "
    "train has reached its last step.",
    "removed checkpoint 12.",
    "removed steps 9 to 12 from metrics/metrics.jsonl.",
    "cm3leon train continues from step 8.",
  ]
  assert sorted(losses(tmp_path)) == list(range(1, 9))
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  assert [line["event"] for line in lines if "event" in line] == ["rolled_back", "resumed"]


def overfitted(folder, loader, **fields):
  """Trains with a too high learning rate, so that an early step has the lowest held-out loss."""
  usual = {"steps": 9, "eval_every": 2, "patience": 9, "tensorboard": False}
  return run(folder, loader, learning_rate=3.0, **{**usual, **fields})


def test_the_result_is_the_step_of_the_lowest_heldout_loss_also_after_a_kill(loader, tmp_path):
  """Evaluations because of a signal, here of step 7, do not count."""
  whole, killed, ended = (tmp_path / name for name in ("whole", "killed", "ended"))
  summary = overfitted(whole, loader)
  lines = read_json_lines(whole / "metrics" / "metrics.jsonl")
  by_step = {x["step"]: x["heldout_image_loss"] for x in lines if "heldout_image_loss" in x}
  assert summary["best"] == min(by_step, key=by_step.get) < 5

  def after(self, step, state, metrics):
    self.code = 75 if step == 7 else None

  with mock.patch.object(StopSignal, "after", after), pytest.raises(SystemExit):
    overfitted(killed, loader)
  with pytest.raises(Crash):
    overfitted(killed, loader, sample_grid=crash_at(9, killed), sample_every=1)
  assert overfitted(killed, loader) == summary
  early = overfitted(ended, loader, patience=2)
  assert early["overfitting"]
  assert (early["steps"], early["best"]) == (summary["best"] + 4, summary["best"])
  with jax.set_mesh(mesh_of(1, 1, 1)):
    found = [reading.load_params(folder, MODEL) for folder in (whole, killed, ended)]
    last, _ = reading.load_params(whole, MODEL, 9)
  assert {step for _, step in found} == {summary["best"]}
  assert_equal(*(params for params, _ in found))
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (last, found[0][0]))))


def test_a_run_with_a_damaged_checkpoint_continues_from_the_one_before(
  whole, loader, tmp_path, capsys
):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(11, tmp_path), sample_every=1)
  files = [p for p in (tmp_path / checkpoint.FOLDER / "8").rglob("*") if p.is_file()]
  max(files, key=lambda p: p.stat().st_size).write_bytes(b"")
  run(tmp_path, loader)
  assert "; the run goes back to checkpoint 4." in capsys.readouterr().out
  assert losses(tmp_path) == losses(whole[0])


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(loader, tmp_path):
  run(tmp_path, loader, steps=9)
  for folder in (checkpoint.FOLDER, f"{checkpoint.FOLDER}.digests"):
    shutil.rmtree(tmp_path / folder)
  with refused(UserError, "logged 9 steps", "no checkpoint"):
    run(tmp_path, loader)
  assert sorted(losses(tmp_path)) == list(range(1, 10))


def test_a_save_that_was_killed_before_its_digests_pushes_no_other_out(loader, tmp_path):
  run(tmp_path, loader, steps=8)
  (tmp_path / "checkpoints.digests" / "8.json").unlink()
  run(tmp_path, loader, steps=9, checkpoint_every=9)
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  events = [line for line in lines if line.get("event") == "resumed"]
  assert [e["from_step"] for e in events] == [4]
  assert sorted(losses(tmp_path)) == list(range(1, 10))
