import dataclasses
import shutil

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.commands import export
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run import bundles
from cm3leon_jax.run.run import Run, ids
from cm3leon_jax.run.source import folder_of
from cm3leon_jax.stages import stages
from examples.scenes import config as scenes
from tests.generation.run import SETTINGS, one_device
from tests.refusals import refused

READ = ["text_tokenizer", "vqgan", "train"]


def test_a_run_has_its_own_folders_and_the_ids_of_its_stages(run):
  trained = Run.open(run)
  assert (trained.settings, trained.kind, trained.step) == (SETTINGS, "workdir", None)
  assert trained.stages == trained.bank == trained.folder == run
  assert ids(trained, READ) == stages.ids(SETTINGS, run, READ)


def test_a_bundle_on_a_base_reads_what_the_base_has(tmp_path):
  base = Run.open("scenes")
  for path in base.folder.iterdir():
    if not path.is_dir():
      path.copy(epath.Path(tmp_path) / path.name)
  stored = read_json(base.folder / bundles.FILE)
  own = {name: value for name, value in stored["digests"].items() if "/" not in name}
  named = {"name": "scenes", "digest": digest(base.folder / bundles.FILE)}
  write_json(tmp_path / bundles.FILE, {**stored, "digests": own, "base": named})
  tuned = Run.open(tmp_path)
  assert tuned.kind == base.kind == "bundle"
  assert tuned.stages == base.stages == base.bank == tuned.bank == folder_of("scenes")
  first, second = (ids(one, [*READ, "neighbors"]) for one in (base, tuned))
  assert first.pop("train") != second.pop("train")
  assert first == second
  assert len(set(first.values())) == 3


def test_the_config_of_a_bundle_may_set_what_its_files_do_not_decide():
  stored = Run.open("scenes").settings
  sampling = dataclasses.replace(stored.sampling, temperature=0.125)
  asked = dataclasses.replace(stored, sampling=sampling, retrieval=SETTINGS.retrieval)
  assert Run.open("scenes", asked).settings == dataclasses.replace(stored, sampling=sampling)
  # The model of this config is smaller than that of the bundle.
  other = settings_from_config(scenes.get_config())
  with refused(UserError, "model."):
    Run.open("scenes", other)


@pytest.mark.parametrize("name", ["hf", "orbax"])
def test_an_export_is_opened_where_it_will_do(run, tmp_path, name):
  folder = tmp_path / name
  export.main(SETTINGS, run, export.Flags(format=name, output=str(folder)))
  opened = Run.open(folder, exports=True)
  assert (opened.settings, opened.kind, opened.step, opened.bank) == (SETTINGS, "export", 7, None)
  with one_device():
    found, step = opened.params()
    expected, _ = Run.open(run).params()
    with refused(UserError, str(run), "step 7", "NaN"):
      Run.open(run).params(average=False)
  assert step == 7
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert opened.text.encode("a red cat").tolist() == Run.open(run).text.encode("a red cat").tolist()
  assert opened.images.config == Run.open(run).images.config
  with refused(UserError, str(folder)):
    Run.open(folder)


def test_a_stopped_run_is_read_at_its_newest_checkpoint(run, tmp_path, capfd):
  workdir = epath.Path(shutil.copytree(run, tmp_path / "stopped"))
  done, seals = workdir / "train" / stages.DONE, workdir / "train" / stages.SEALS
  finished = done.read_text()
  done.unlink()
  line = f"{done.parent}: the training is not finished; its newest checkpoint, step 7, is used.\n"
  read = []
  for _ in range(2):
    export.main(SETTINGS, workdir, export.Flags(format="orbax"))
    about = read_json(workdir / "export" / stages.DONE)
    assert (capfd.readouterr().err, about["summary"]["step"]) == (line * (not done.exists()), 7)
    read.append(about["config"]["inputs"]["train"])
    assert read[-1] == ids(Run.open(workdir), ["train"])["train"]
    done.write_text(finished)  # Now the export is one of another training, and is written again.
  assert read == [f"step 7: {digest(seals / '7.json')}", "train"]
  done.unlink()
  (seals / "7.json").unlink()
  with pytest.raises(UserError, match="train is not finished: run `cm3leon train`"):
    ids(Run.open(workdir), ["train"])
