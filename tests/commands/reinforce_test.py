"""Tests that launch.reinforce starts from a tiny run, stops, continues, and makes a usable run."""

import dataclasses

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.commands import reinforce
from cm3leon_jax.commands.shared_flags import Training
from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.config.training import ReinforceConfig, TrainConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.reinforcement import rollouts
from cm3leon_jax.run import initial
from cm3leon_jax.stages import stages
from examples.scenes import grade
from examples.scenes.judge import answers
from tests.commands.instructions_test import copy, encode, one_mesh, settings_of, tasks_of
from tests.generation.run import save_run
from tests.refusals import refused

# The tiny model never draws a correct image. This reward is sometimes equal for a whole group.
REWARD = """
def bright(prompts, images, records):
  return images.mean((1, 2, 3)) > 129
"""


def settings_to_learn(reward="judge", **fields):
  settings = settings_of()
  train = dataclasses.replace(settings.train, global_batch_size=8)
  return dataclasses.replace(
    settings,
    instructions=InstructionsConfig(**tasks_of(("draw", "count"), 64)),
    train=train,
    optimizer=dataclasses.replace(settings.optimizer, learning_rate=1e-2, ema_decay=0.5),
    reinforce=ReinforceConfig(samples=4, reward=reward, heldout_prompts=2, **fields),
    evaluation=dataclasses.replace(settings.evaluation, judge=f"{answers.__file__}:mistakes"),
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("source"))
  save_run(root)
  return root


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  with one_mesh():
    copy(settings_to_learn(), workdir, source)
    encode(settings_to_learn(), workdir)
  return workdir


def steps_of(workdir):
  lines = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")
  names = ("step", "reward", "spread", "dead_groups", "kl", "grad_norm", "heldout_loss")
  return [{name: line[name] for name in names if name in line} for line in lines]


@pytest.mark.slow
def test_it_learns_stops_continues_and_is_graded(source, prepared, tmp_path, capsys, monkeypatch):
  """Refilled batches, neighbors and a reward of the user are the same in a run that continues."""
  (tmp_path / "own.py").write_text(REWARD)
  settings = settings_to_learn(f"{tmp_path / 'own.py'}:bright", retrieve=1)
  workdirs = [tmp_path / "whole", tmp_path / "stopped"]
  for workdir in workdirs:
    for stage in ("text_tokenizer", "vqgan", "clip", "instructions"):
      workdir.mkdir(exist_ok=True)
      (workdir / stage).symlink_to(prepared / stage)
  whole, stopped = map(epath.Path, workdirs)
  with one_mesh():
    reinforce.main(settings, whole, Training(init_from=str(source)))
    printed = capsys.readouterr().out
    steps, draw = [], rollouts.Rollouts.draw

    def fails_at_the_second_step(self, params, numbers):
      steps.append(numbers)
      if len(steps) == 2:
        raise KeyboardInterrupt
      return draw(self, params, numbers)

    with monkeypatch.context() as patch:
      patch.setattr(rollouts.Rollouts, "draw", fails_at_the_second_step)
      with pytest.raises(KeyboardInterrupt):
        reinforce.main(settings, stopped, Training(init_from=str(source)))
    assert steps == [range(8), range(8, 16)]
    reinforce.main(settings, stopped, Training())
    grade.main(settings, whole, 4)
  assert "reinforce: held-out prompts, draw, before -> after: reward " in printed
  assert "train: held-out loss before -> after: draw " in printed
  found, expected = steps_of(stopped), steps_of(whole)
  assert [line for line in found if "reward" in line] == [x for x in expected if "reward" in x]
  lines = [line for line in expected if "reward" in line]
  assert len(lines) == 2
  assert all(line["grad_norm"] > 0 for line in lines)  # Otherwise any two runs would be equal.
  assert any(line["dead_groups"] > 0 for line in lines)
  summary = read_json(whole / "train" / stages.DONE)["summary"]
  assert summary["scores"]["draw"].keys() == {"reward", "spread"}
  change = summary["scores"]["draw"]["reward"] - summary["scores_before"]["draw"]["reward"]
  assert summary["gains"]["draw"]["mean"] == pytest.approx(change)
  assert initial.recorded(whole).source == str(source)
  assert set(read_json(whole / "grades" / stages.DONE)["summary"]["tasks"]) == {"draw", "count"}


@pytest.mark.slow
def test_clip_scores_captions(source, prepared, tmp_path):
  """A reward by CLIP needs neither a bank nor a judge."""
  workdir, settings = epath.Path(tmp_path), settings_to_learn("clip")
  for stage in ("text_tokenizer", "vqgan", "clip", "instructions"):
    (tmp_path / stage).symlink_to(prepared / stage)
  with one_mesh():
    reinforce.main(settings, workdir, Training(init_from=str(source)))
  summary = read_json(workdir / "train" / stages.DONE)["summary"]
  assert summary["scores"]["draw"].keys() == {"reward", "spread"}
  assert np.isfinite(summary["scores"]["all"]["reward"])
  other = dataclasses.replace(settings, reinforce=ReinforceConfig(samples=4, reward="judge"))
  with one_mesh(), pytest.raises(UserError, match=r"reinforce\.reward: clip -> judge"):
    reinforce.main(other, workdir, Training())


@pytest.mark.slow
def test_a_changed_reward_is_another_run(source, prepared, tmp_path):
  own = tmp_path / "own.py"
  own.write_text(REWARD)
  settings, workdir = settings_to_learn(f"{own}:bright"), tmp_path / "run"
  workdir.mkdir()
  for stage in ("text_tokenizer", "vqgan", "clip", "instructions"):
    (workdir / stage).symlink_to(prepared / stage)
  with one_mesh():
    reinforce.main(settings, epath.Path(workdir), Training(init_from=str(source)))
    own.write_text(REWARD.replace("129", "130"))
    with pytest.raises(UserError, match=r"reinforce\.reward_sha256"):
      reinforce.main(settings, epath.Path(workdir), Training())


def test_neighbors_without_a_bank_are_refused(source, prepared, tmp_path):
  """Neither the run nor its start, an empty copy of a run, has documents."""
  start, workdir = tmp_path / "start", tmp_path / "run"
  for folder, of, stages_of in (
    (start, source, ("train", "text_tokenizer", "vqgan", "clip")),
    (workdir, prepared, ("text_tokenizer", "vqgan", "clip", "instructions")),
  ):
    folder.mkdir()
    for stage in stages_of:
      (folder / stage).symlink_to(str(of / stage))
  with one_mesh(), refused(UserError, "config.reinforce.retrieve"):
    reinforce.main(
      settings_to_learn(retrieve=1), epath.Path(workdir), Training(init_from=str(start))
    )


@pytest.mark.parametrize(
  ("changes", "fact"),
  [({}, "--init_from="), ({"train": TrainConfig(replay_every=2)}, "config.train.replay_every")],
)
def test_a_run_without_a_start_or_with_checked_steps_is_refused(prepared, tmp_path, changes, fact):
  settings = dataclasses.replace(settings_to_learn(), **changes)
  for stage in ("text_tokenizer", "vqgan", "clip", "instructions"):
    (tmp_path / stage).symlink_to(prepared / stage)
  with refused(UserError, fact):
    reinforce.main(settings, epath.Path(tmp_path), Training())
  assert not (tmp_path / "train").exists()
