import dataclasses
import resource
import shutil

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.commands import import_weights, train, train_text_tokenizer
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation import heldout
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.trained import initial
from tests.importing.importer_test import QWEN3
from tests.launch import tiny_config
from tests.launch.stages_before import make_workdir
from tests.launched import launch
from tests.models.tiny import mesh_of
from tests.refusals import refused

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
  import_weights.main(settings_of_run(), epath.Path(folder), str(qwen3_folder))
  return folder


def test_a_run_begins_with_what_was_imported_and_remembers_it(
  imported, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(heldout, "sample_grids", lambda *_: None)
  folder = tmp_path / "run"
  shutil.copytree(imported, folder, symlinks=True)
  settings = settings_of_run()
  train.main(settings, epath.Path(folder))
  printed = capsys.readouterr().out
  assert f"train: the run starts from the parameters of {folder / 'init'}." in printed
  done = read_json(folder / "train" / stages.DONE)
  assert done["config"]["init_from"]["source"] == str(folder / "init")
  assert np.isfinite(done["summary"]["heldout_loss"])
  with jax.set_mesh(mesh_of(1, 1, 1)):
    start = initial.load(initial.find(settings, str(folder / "init")), settings)
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
  train.main(settings, epath.Path(folder))  # Does nothing: the run is finished.
  assert "finished already" in capsys.readouterr().out


def test_a_run_does_not_begin_with_half_an_import(imported, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(imported, folder, symlinks=True)
  (folder / "init" / stages.DONE).unlink()
  with refused(UserError):
    train.main(settings_of_run(), epath.Path(folder))
  assert not (folder / "train").exists()


def test_a_full_disk_is_one_sentence_and_the_import_does_not_count(qwen3_folder, tmp_path):
  settings = settings_of_run()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
  try:
    with refused(TryAgain):
      import_weights.main(settings, epath.Path(tmp_path), str(qwen3_folder))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not (tmp_path / "init" / "model.safetensors").exists()
  assert not (tmp_path / "init" / stages.DONE).exists()


def test_the_tokenizer_stays_and_is_that_of_the_documents(imported, capsys):
  settings = settings_of_run()
  before = read_json(imported / "text_tokenizer" / stages.DONE)
  train_text_tokenizer.main(settings, imported)
  assert "made by cm3leon import_weights, stays as it is" in capsys.readouterr().out
  assert read_json(imported / "text_tokenizer" / stages.DONE) == before
  tokenizer = TextTokenizer(imported / "text_tokenizer", settings.vocab)
  assert tokenizer.decode(tokenizer.encode("a red bell")) == "a red bell"
  assert not initial.other_tokenizers(str(imported / "init"), imported)


@pytest.mark.slow
def test_the_command_prints_what_it_did_and_what_the_config_needs(qwen3_folder, tmp_path):
  flags = [f"--source={qwen3_folder}", "--config=tests/launch/tiny_config.py"]
  first = launch("import_weights", *flags, f"--workdir={tmp_path}")
  assert first.returncode == 2
  assert first.stderr.count("\n") == 1
  needed = first.stderr.split("add the flags ")[1].split()
  again = launch("import_weights", *flags, f"--workdir={tmp_path}", *needed)
  assert again.returncode == 0, again.stderr
  lines = again.stdout.splitlines()
  assert lines[0].startswith(
    f"import_weights: {qwen3_folder}: qwen3, 2 layers of width 32, 4 heads"
  )
  assert lines[-1].startswith(
    "import_weights: the next stages, and `cm3leon train` with this --work"
  )
  assert lines[-1].endswith(f" start from it and need {' '.join(needed)}")
  assert (tmp_path / "init" / "model.safetensors").exists()
  own = tmp_path / "own.py"
  own.write_text(
    "from tests.launch import tiny_config\n"
    "def get_config():\n"
    "  config = tiny_config.get_config()\n"
    f"  config.model.update({QWEN3})\n"
    "  return config\n"
  )
  whole = launch("import_weights", flags[0], f"--config={own}", f"--workdir={tmp_path}")
  assert whole.stdout.splitlines()[-1].endswith(" with this --workdir, start from it.")
  nameless = launch("import_weights", *flags[1:], f"--workdir={tmp_path}")
  assert nameless.stderr == "error: name the folder of the checkpoint: --source=DIR.\n"


def test_a_finished_import_of_this_project_keeps_its_tokenizer(imported, tmp_path):
  """Imports an import: it has the format of an export, so another workdir can use it."""
  settings = settings_of_run()
  import_weights.main(settings, epath.Path(tmp_path), str(imported / "init"))
  for name in ("text_tokenizer/tokenizer.json", "init/model.safetensors", "init/config.json"):
    assert (tmp_path / name).read_bytes() == (imported / name).read_bytes()
  other = dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_layers=3))
  with refused(UserError):
    import_weights.main(other, epath.Path(tmp_path), str(imported / "init"))
