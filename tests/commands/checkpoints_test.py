"""Tests that `cm3leon checkpoints` lists, verifies and rolls back checkpoints."""

import json
import shutil

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.faults import lease
from cm3leon_jax.training.saves import upkeep
from cm3leon_jax.weights.checkpoint import Checkpoints
from cm3leon_jax.weights.sealing import files_below
from tests.launched import SLOW, launch
from tests.refusals import check_refused, check_sentence, refused

STEPS = (2, 4, 6, 8)
LOSSES = {2: 3.0, 4: 1.5, 6: 2.0, 8: 2.5}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """Makes a finished run with nine steps and a small training state."""
  folder = tmp_path_factory.mktemp("original")
  with Checkpoints(folder, keep=9) as checkpoints:
    for step in STEPS:
      checkpoints.save({"w": np.full(1_000, step, np.float32)}, step, next_row=step)
  lines = []
  for step in range(1, 10):
    lines.append({"step": step, "loss": 9.0 - step, "time": 100.0 + step})
    if step in LOSSES:
      modalities = {"heldout_image_loss": 1.25, "heldout_text_loss": 6.0}
      lines.append({"step": step, "heldout_loss": LOSSES[step], **modalities})
  (folder / "metrics").mkdir()
  (folder / "metrics" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  (folder / "done.json").write_text("{}")
  return folder


@pytest.fixture
def workdir(original, tmp_path):
  shutil.copytree(original, tmp_path / "train")
  return epath.Path(tmp_path)


def command(workdir, *arguments):
  return launch("checkpoints", *arguments, f"--workdir={workdir}", imported=SLOW)


def steps(workdir):
  folders = (workdir / "train" / "checkpoints", workdir / "train" / "checkpoints.digests")
  found, digests = (sorted(int(p.stem) for p in folder.iterdir()) for folder in folders)
  assert found == digests
  return found


def flip(workdir, step):
  folder = workdir / "train" / "checkpoints" / str(step)
  largest = max((folder / x for x in files_below(folder)), key=lambda p: p.stat().length)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(bytes(content))
  return largest


def test_list_shows_every_checkpoint_with_its_losses(workdir):
  (workdir / "train" / "checkpoints.digests" / "6.json").unlink()
  result = command(workdir, "list")
  assert (result.returncode, result.stderr) == (0, "")
  title, columns, *rows = result.stdout.splitlines()
  assert title == f"{workdir}/train: 4 checkpoints"
  assert " ".join(columns.split()) == "step written (UTC) size state held-out loss, nats"
  assert [int(row.split()[0]) for row in rows] == list(STEPS)
  assert ["not sealed" in row for row in rows] == [False, False, True, False]
  assert rows[1].endswith(" sealed      1.500 image 1.250 text 6.000")
  assert all(" kB  " in row for row in rows)


def test_verify_names_the_damaged_file(workdir):
  victim = flip(workdir, 4)
  result = command(workdir, "verify")
  check_sentence(result.stderr, "1 of 4", f"{victim} is damaged", "continues from 8", "--step=8")
  states = [row.split()[5] for row in result.stdout.splitlines()[2:]]
  assert states == ["whole", "damaged", "whole", "whole"]
  for step in (2, 6, 8):
    flip(workdir, step)
  check_verified(workdir, "4 of 4", "from a copy")


def check_verified(workdir, *facts):
  with upkeep.open_run(workdir / "train") as checkpoints:
    found = upkeep.entries(checkpoints)
    damages = upkeep.verify(checkpoints, found)
  with refused(UserError, *facts):
    upkeep.check_verified(workdir / "train", found, damages)


def test_no_sealed_checkpoint_is_said_by_every_action(workdir):
  train = workdir / "train"
  shutil.rmtree(train / "checkpoints.digests")
  with refused(UserError, "2, 4, 6, 8", "not sealed", "checkpoints.digests"):
    upkeep.rollback(train, 4)
  check_verified(workdir, "2, 4, 6, 8", "not sealed")
  for step in (2, 4, 6):
    shutil.rmtree(train / "checkpoints" / str(step))
  check_verified(workdir, "no sealed checkpoint", "`cm3leon train`")


def test_rollback_removes_what_is_newer_and_says_so(workdir):
  train = workdir / "train"
  result = command(workdir, "rollback", "--step=4")
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.splitlines() == [
    f"removed {train / 'done.json'}: without it the run is not finished, so generate, evaluate "
    "and export use its newest checkpoint, or with train.patience its best one, until cm3leon "
    "train has reached its last step.",
    "removed checkpoints 6, 8.",
    "removed steps 5 to 9 from metrics/metrics.jsonl.",
    "cm3leon train continues from step 4.",
  ]
  assert steps(workdir) == [2, 4]
  lines = read_json_lines(train / "metrics" / "metrics.jsonl")
  assert max(line["step"] for line in lines) == 4
  assert lines[-1] == {"step": 4, "event": "rolled_back", "from_step": 9, "time": 109.0}


def test_rollback_to_the_newest_step_of_a_finished_run_removes_nothing(workdir):
  assert upkeep.rollback(workdir / "train", 8) == ["Step 8 is the newest: nothing to remove."]
  assert steps(workdir) == list(STEPS)
  assert (workdir / "train" / "done.json").exists()


def test_rollback_to_a_step_that_is_not_whole_changes_nothing(workdir):
  flip(workdir, 4)
  with refused(UserError, "checkpoints/4/", "is damaged"):
    upkeep.rollback(workdir / "train", 4)
  with refused(UserError, "no sealed checkpoint of step 5", "2, 4, 6, 8"):
    upkeep.rollback(workdir / "train", 5)
  (workdir / "train" / "checkpoints.digests" / "6.json").rename(workdir / "6.json")
  with refused(UserError, "no sealed checkpoint of step 6"):
    upkeep.rollback(workdir / "train", 6)
  (workdir / "6.json").rename(workdir / "train" / "checkpoints.digests" / "6.json")
  assert steps(workdir) == list(STEPS)
  assert (workdir / "train" / "done.json").exists()


def test_nothing_is_removed_while_a_job_trains(workdir, monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
  with lease.Lease(workdir / "train"), refused(UserError, "works in", str(workdir)):
    upkeep.rollback(workdir / "train", 2)
  assert steps(workdir) == list(STEPS)


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["lsit"],
    ["rollback"],
    ["rollback", "--step=x"],
    ["verify", "--step=4"],
    ["rollback", "--step=1", "--skip_rows=2"],
    ["list"],
    ["rollback", "--step=1596"],
  ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, arguments):
  check_refused(command(tmp_path, *arguments))
  assert list(tmp_path.iterdir()) == []
