import dataclasses
import shutil

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.commands import common, import_weights, train
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.configs import chameleon_lora
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.generation import heldout
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import load_initial
from cm3leon_jax.stages import stages
from cm3leon_jax.weights import reading
from tests.importing import published_chameleon
from tests.importing.importer_test import QWEN3
from tests.launch import tiny_config
from tests.launch.several_processes_test import TOLERANCE
from tests.launch.stages_before import make_workdir
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.training.runs import Crash, crash_at

STEPS = 2


def settings_of_run():
  config = tiny_config.get_config()
  config.model.update({**QWEN3, "max_positions": 64})
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  config.optimizer.update({"ema_decay": 0.0, "learning_rate": 1e-3, "warmup_steps": 0})
  config.train.update({"steps": STEPS, "eval_every": STEPS, "sample_every": 10})
  return settings_from_config(config)


@pytest.fixture(scope="module")
def imported(qwen3_folder, tmp_path_factory):
  """Makes an untrained run with the imported parameters and tokenizer of a Qwen3."""
  folder = tmp_path_factory.mktemp("run")
  make_workdir(folder, settings_of_run())
  shutil.rmtree(folder / "text_tokenizer")
  import_weights.main(
    settings_of_run(), epath.Path(folder), import_weights.Flags(source=str(qwen3_folder))
  )
  return folder


def test_a_run_begins_with_what_was_imported_and_remembers_it(
  imported, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(heldout, "sample_grids", lambda *_: None)
  folder = tmp_path / "run"
  shutil.copytree(imported, folder, symlinks=True)
  settings = settings_of_run()
  train.main(settings, epath.Path(folder), train.Flags())
  printed = capsys.readouterr().out
  assert f"train: the run starts from the parameters of {folder / 'init'}." in printed
  done = read_json(folder / "train" / stages.DONE)
  assert done["config"]["init_from"]["source"] == str(folder / "init")
  assert np.isfinite(done["summary"]["heldout_loss"])
  with jax.set_mesh(mesh_of(1, 1, 1)):
    start = load_initial(initial.find(settings, str(folder / "init")), settings)
    trained, step = reading.load_params(folder / "train", settings.model)
  assert step == STEPS
  for name in ("embed", "head"):
    before, after = (np.asarray(tree[name]) for tree in (start, trained))
    assert 0 < np.abs(after - before).max() < 10 * STEPS * 1e-3
    # The rows of all codes start equal, and training makes them different.
    codes = slice(settings.vocab.text_size, None)
    assert np.ptp(before[codes], axis=0).max() == 0
    seen = np.unique(after[codes].round(7), axis=0)
    assert len(seen) > 60
  train.main(settings, epath.Path(folder), train.Flags())  # Does nothing: the run is finished.
  assert "finished already" in capsys.readouterr().out


def test_a_run_does_not_begin_with_half_an_import(imported, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(imported, folder, symlinks=True)
  (folder / "init" / stages.DONE).unlink()
  with refused(UserError, str(folder)):
    train.main(settings_of_run(), epath.Path(folder), train.Flags())
  assert not (folder / "train").exists()


def lora_settings():
  """Returns the settings of `chameleon_lora` with the sizes of the tiny Chameleon."""
  config, tiny = chameleon_lora.get_config(), tiny_config.get_config()
  config.vocab.update(dataclasses.asdict(published_chameleon.make_settings().vocab))
  config.vqgan.update(tiny.vqgan)
  config.model.update(published_chameleon.MODEL, max_positions=64, dtype="float32")
  config.data.update(sequence_length=64, pack_window=64)
  config.train.update(steps=6, eval_every=3, checkpoint_every=2, sample_every=1, eval_batches=1)
  config.optimizer.update(learning_rate=1e-2, warmup_steps=1)
  return settings_from_config(config)


@pytest.mark.slow
def test_adapters_of_a_chameleon_continue_on_another_number_of_devices(
  chameleon, tmp_path, monkeypatch
):
  """Stopped in step 5 on one device and continued on four, they equal a run on eight."""
  settings, base = lora_settings(), tmp_path / "base"
  make_workdir(base, settings)
  for name in ("text_tokenizer", "vqgan"):
    shutil.rmtree(base / name)
  flags = import_weights.Flags(source=str(chameleon[1]))
  import_weights.main(settings, epath.Path(base), flags)

  def tuned(name, *shape, sample_grid=None):
    folder = epath.Path(tmp_path / name)
    monkeypatch.setattr(common, "make_mesh", lambda _: mesh_of(*shape))
    monkeypatch.setattr(common, "use_mesh", lambda _: jax.set_mesh(mesh_of(*shape)))
    monkeypatch.setattr(heldout, "sample_grids", lambda *_: sample_grid)
    if not folder.exists():
      parts = shutil.ignore_patterns("init", "made")
      shutil.copytree(base, folder, symlinks=True, ignore=parts)
    train.main(settings, folder, train.Flags(init_from=str(base)))
    lines = read_json_lines(folder / "train" / "metrics" / "metrics.jsonl")
    [resumed] = [x["from_step"] for x in lines if x.get("event") == "resumed"] or [0]
    steps = [(x["weight"], x["loss"]) for x in lines if "loss" in x]
    summary = read_json(folder / "train" / stages.DONE)["summary"]
    return resumed, summary["rows"], *map(np.array, zip(*steps, strict=True))

  _, rows, weights, losses = tuned("whole", 2, 2, 2)
  stop = crash_at(5, tmp_path / "moved" / "train")
  with pytest.raises(Crash):
    tuned("moved", 1, 1, 1, sample_grid=stop)
  resumed, found_rows, found_weights, found = tuned("moved", 1, 2, 2)
  assert (resumed, len(found)) == (4, 6)
  assert found_rows == rows
  np.testing.assert_array_equal(found_weights, weights)  # Of the targets of each batch.
  assert np.abs(found - losses).max() < TOLERANCE < np.abs(found[:-1] - losses[1:]).min()
