import dataclasses
import pathlib

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.commands import common, train
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.data.rows import skipped_rows
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.generation import heldout
from cm3leon_jax.models import transformer
from cm3leon_jax.run import pace
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training import decoder
from cm3leon_jax.training.saves import upkeep
from cm3leon_jax.weights import reading
from tests.data.stores import VOCAB
from tests.generation.run import make_config, make_run, one_device
from tests.held import held
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors
from tests.run import rows_test
from tests.run.rows_test import settings_with

workdir = rows_test.workdir


def test_a_workdir_of_another_run_is_refused(workdir):
  first = settings_with()
  config = {"run": stages.run_config(first, workdir, "train"), "train": {}}
  write_json(workdir / "train" / "config.json", config)
  optimizer = dataclasses.replace(first.optimizer, learning_rate=0.5)
  other = dataclasses.replace(first, optimizer=optimizer)
  with refused(UserError, "another config", "--allow_changed=optimizer.learning_rate"):
    train.main(other, workdir, train.Flags())


def test_checkpoints_without_their_config_are_refused(workdir):
  """Without the stored config, no given config can be checked, so each is rejected."""
  folder = pathlib.Path(workdir) / "train"
  (folder / "checkpoints" / "5").mkdir(parents=True)
  with refused(UserError, "config.json is missing", str(folder)):
    train.main(settings_with(), workdir, train.Flags())
  assert sorted(path.name for path in folder.iterdir()) == ["checkpoints"]


def test_a_workdir_in_which_another_job_trains_is_left_as_it_is(workdir):
  folder = pathlib.Path(workdir) / "train"
  with held(folder):
    with pytest.raises(UserError, match=r"works in .*: use another --workdir"):
      train.main(settings_with(steps=2), workdir, train.Flags())
    names = {path.name for path in folder.iterdir()}
    assert names - {"lease.json.partial"} == {"lease.json"}  # The other job may be writing it.


def test_length_and_execution_do_not_make_another_run(workdir):
  first = settings_with()
  model = dataclasses.replace(first.model, remat_policy="none", loss_chunk=8, unroll_layers=True)
  longer = dataclasses.replace(settings_with(steps=7), model=model)
  assert stages.run_config(first, workdir, "train") == stages.run_config(longer, workdir, "train")


@pytest.fixture
def root(tmp_path, monkeypatch):
  make_run(folder := epath.Path(tmp_path))
  write_neighbors(folder / "neighbors" / "train_pairs", ids=np.full((12, 4), -1, np.int32))
  for stage in ("documents", "neighbors"):
    write_json(folder / stage / stages.DONE, {"id": stage, "config": {}, "summary": {}})
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())
  return folder


@pytest.mark.slow
def test_a_run_starts_from_the_codebook_of_its_image_tokenizer(root, monkeypatch):
  """Initial embeddings of codes are linear in the codebook vectors, also after a short training."""
  table = ImageTokenizer.load(root / "vqgan").params["codebook"]["table"]
  codebook = table / np.linalg.norm(table, axis=1, keepdims=True)
  config = make_config()
  config.model.update({"family": "modern", "embed_std": 0.25, "codebook_start": 1.0})
  config.data.update({"num_neighbors": 0, "text_share": 0.0, "pack_window": 8})
  config.train.update({"global_batch_size": 1, "steps": 2})
  config.optimizer.update({"learning_rate": 1e-7})
  settings = settings_from_config(config)
  monkeypatch.setattr(heldout, "sample_grids", lambda *_: None)
  train.main(settings, root, train.Flags())
  with one_device():
    trained, step = reading.load_params(root / "train", settings.model)
    init = jax.jit(transformer.init_params, static_argnums=0)
    random = init(settings.model, jax.random.key(settings.seed))
  assert step == 2
  inputs = np.concatenate([codebook, np.ones((len(codebook), 1))], axis=1)

  def unexplained(params):
    rows = np.asarray(params["embed"])[VOCAB.text_size :]
    assert rows.std() == pytest.approx(0.25, rel=0.1)
    return np.abs(rows - inputs @ np.linalg.lstsq(inputs, rows)[0]).max()

  assert unexplained(trained) < 1e-4
  assert unexplained(random) > 0.1  # Negative control.


def short_config(**train_fields):
  """Returns a config with one pair per row. Its program is compiled once for all tests."""
  config = make_config()
  config.data.update({"num_neighbors": 0, "text_share": 0.0, "pack_window": 8})
  config.train.update({"global_batch_size": 1, "steps": 4, "tensorboard": False, **train_fields})
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 1})
  return config


def test_measuring_a_step_decides_the_steps_and_keeps_nothing_else(root, monkeypatch):
  monkeypatch.setattr(decoder, "step_seconds", lambda training, count: 0.5)
  before = set(pathlib.Path(root).rglob("*"))
  train._measure(settings_from_config(short_config(minutes=15.0)), root, "", 300.0)
  assert set(pathlib.Path(root).rglob("*")) - before == {pathlib.Path(root / pace.FILE)}
  found = pace.read(root)
  assert 300 < found.seconds_before < 360
  assert found == pace.Pace.of(15.0, found.seconds_before, 0.5, found.steps_after)


@pytest.mark.slow
def test_a_run_goes_on_with_a_field_that_was_allowed_to_change(root, capsys):
  def start(learning_rate, steps, *allowed):
    config = short_config(steps=steps, sample_every=100)
    config.optimizer.update({"learning_rate": learning_rate})
    train.main(settings_from_config(config), root, train.Flags(allow_changed=tuple(allowed)))

  name = "optimizer.learning_rate"
  start(1e-3, 4)
  with refused(UserError, f"--allow_changed={name}"):
    start(0.5, 5)
  with refused(UserError, "finished at step 4", name):
    start(0.5, 4, name)
  start(0.5, 5, name)
  assert f"train: continues with {name}: 0.001 -> 0.5." in capsys.readouterr().out
  lines = read_json_lines(root / "train" / "metrics" / "metrics.jsonl")
  rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
  assert rates[4] < 2e-3
  assert rates[5] > 0.04
  stored = read_json(root / "train" / "config.json")
  assert stored["changes"] == [{"step": 4, "fields": [f"{name}: 0.001 -> 0.5"]}]
  start(0.5, 5)  # The stored config now has the new rate, so `allow_changed` is not needed.
  assert "finished already" in capsys.readouterr().out
  assert read_json(root / "train" / "config.json")["changes"] == stored["changes"]


@pytest.mark.slow
def test_a_run_that_was_rolled_back_leaves_rows_out(root, monkeypatch):
  settings, folder = settings_from_config(short_config(checkpoint_every=1)), root / "train"
  train.main(settings, root, train.Flags())
  with refused(UserError, "row 2", "checkpoint 3"):
    upkeep.rollback(folder, 3, range(2, 5))

  def losses():
    lines = read_json_lines(folder / "metrics" / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}

  first = losses()
  upkeep.rollback(folder, 3, range(3, 6))
  train.main(settings, root, train.Flags())
  assert [first[i] == losses()[i] for i in range(1, 5)] == [True, True, True, False]
  longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=6))
  rows = []
  monkeypatch.setattr(
    "cm3leon_jax.training.objective.Remaining.number",
    lambda self, i: rows.append(skipped_rows.row_number(i, self._skipped)) or rows[-1],
  )
  train.main(longer, root, train.Flags())
  assert rows[:2] == [7, 8]  # The run had read 0, 1, 2 and 6 and left out 3 to 5.


def test_wrong_profile_steps_are_refused_before_training(workdir):
  with refused(UserError, "--profile_steps"):
    train.main(settings_with(), workdir, train.Flags(profile_steps="5"))
  assert not (workdir / "train").exists()
