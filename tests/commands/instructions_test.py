import atexit
import contextlib
import dataclasses
import functools
import hashlib
import io
import pathlib
import shutil
import tempfile
from unittest import mock

from etils import epath
import jax
import pytest

from cm3leon_jax.commands import common, copy_tokenizers, encode_instructions, train
from cm3leon_jax.commands.shared_flags import Encoding, InitFrom
from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols import run as protocols
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.run import copies
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from examples.scenes import grade
from tests.evaluation.protocol_runs import make_data
from tests.examples.scenes.records import write_tasks
from tests.generation.run import SETTINGS, save_run
from tests.refusals import refused

NAMES = ("count", "recolor")


@functools.cache
def tasks_of(names=NAMES, train=24):
  """Writes tasks once, for all tests of the process. Returns them and their folder."""
  root = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, root, ignore_errors=True)
  return {"own_tasks": write_tasks(root, names, train, 8), "root": str(root)}


def settings_of(**fields):
  instructions = InstructionsConfig(**tasks_of(), **fields)
  optimizer = dataclasses.replace(SETTINGS.optimizer, warmup_steps=1)
  steps = {"steps": 2, "checkpoint_every": 1, "eval_every": 2, "eval_batches": 1}
  length = dataclasses.replace(SETTINGS.train, **steps, global_batch_size=2, tensorboard=False)
  sections = {"instructions": instructions, "optimizer": optimizer, "train": length}
  sections["data"] = dataclasses.replace(SETTINGS.data, pack_window=16)
  evaluation = dataclasses.replace(SETTINGS.evaluation, num_resamples=100, batch_size=8)
  sections |= {"mesh": MeshConfig(1, 1, 1), "evaluation": evaluation}
  # Differs from the seed of the run that it is tuned from.
  return dataclasses.replace(SETTINGS, seed=1, **sections)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("source"))
  save_run(root)
  return root


def copy(settings, workdir, source, of_parent=None):
  with mock.patch.object(common, "parent_fields", return_value=of_parent):
    copy_tokenizers.main(settings, workdir, InitFrom(str(source)))


@pytest.mark.parametrize("documents", [0, 9])
def test_a_base_without_documents_is_warned_of(documents, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(copies, "copy_tokenizers", lambda *_: {})
  copy(SETTINGS, epath.Path(tmp_path), "a_base", {"data.base_documents": documents})
  assert ("warning: a_base has no documents" in capsys.readouterr().out) == (not documents)


def encode(settings, workdir):
  """Encodes records although the image tokenizer, with random weights, fits no images."""
  loose = Encoding(min_psnr=0.0, max_color_difference=0.0)
  encode_instructions.main(settings, workdir, loose)


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory):
  workdir, settings = epath.Path(tmp_path_factory.mktemp("tuned")), settings_of()
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed), one_mesh():
    copy(settings, workdir, source)
    copy(settings, workdir, source)
    encode(settings, workdir)
    train.main(settings, workdir, train.Flags(init_from=str(source)))
  return workdir, settings, printed.getvalue()


@contextlib.contextmanager
def one_mesh():
  with pytest.MonkeyPatch.context() as patch:
    mesh = create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    patch.setattr(common, "make_mesh", lambda settings, stage="": mesh)
    yield


def test_a_run_is_tuned(tuned):
  workdir, _, printed = tuned
  assert "text_tokenizer copied, vqgan copied, clip copied" in printed
  assert "text_tokenizer there already" in printed
  assert "train_count: 24 documents, 0 rejected" in printed
  lines = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")
  assert [line["step"] for line in lines if "loss" in line] == [1, 2]
  steps = [line["step"] for line in lines if "heldout_loss/count" in line]
  assert steps == [0, 2]  # The held-out loss is computed before and after training.


def test_its_answers_are_graded(tuned, capsys):
  workdir, settings, _ = tuned
  with one_mesh():
    grade.main(settings, workdir, 6, redrawn=True)
    result = read_json(workdir / "grades" / stages.DONE)["summary"]
    assert list(result["tasks"]) == list(NAMES)
    models = {"before", "after", "redrawn"}
    assert set(result["tasks"]["count"]) == {*models, "majority", "any object"}
    assert set(result["tasks"]["recolor"]) == {*models, "copy", "tokenizer"}
    assert result["tasks"]["recolor"]["copy"]["right"]["share"] == 0
    capsys.readouterr()
    grade.main(settings, workdir, 6, redrawn=True)
  assert "finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_protocol_measures_the_run_before_and_after_tuning(tuned, source, tmp_path):
  workdir, settings, _ = tuned
  data = str(make_data(tmp_path))
  [protocol] = protocol_lib.load("cm3leon_table2/vizwiz").values()
  protocol = dataclasses.replace(
    protocol, data=dataclasses.replace(protocol.data, count=0), extractor=""
  )
  columns = {}
  with one_mesh():
    for before in (True, False):
      options = protocols.Options(data=data, before=before)
      with common.use_mesh(settings):
        _, result = protocols.run(Run.open(workdir, settings), "x", protocol, options)
      assert result["step"] == (0 if before else 2)
      columns[before] = result["columns"]["greedy"]
    assert list(columns[True]["metrics"]) == ["vqa_accuracy", "exact_match"]
    assert columns[True] != columns[False]
    with refused(UserError, "--before", "parameters"):
      options = dataclasses.replace(options, before=True)
      protocols.run(Run.open(source, settings), "x", protocol, options)


def test_one_more_task_leaves_the_stores_of_the_others(source, tmp_path):
  workdir, settings = epath.Path(tmp_path), settings_of(only=("count",))
  copy(settings, workdir, source)
  encode(settings, workdir)
  before = (workdir / "instructions" / "train_count" / "targets.npy").stat().mtime
  encode(settings_of(), workdir)
  assert (workdir / "instructions" / "train_count" / "targets.npy").stat().mtime == before
  assert (workdir / "instructions" / "train_recolor" / "targets.npy").exists()
  done = read_json(workdir / "instructions" / stages.DONE)
  assert list(done["summary"]) == [f"{s}_{n}" for n in NAMES for s in ("train", "heldout")]


def test_only_edits_are_encoded_again_with_their_instruction_first(source, tmp_path):
  workdir, folder = epath.Path(tmp_path), tmp_path / "instructions"
  copy(settings_of(), workdir, source)

  def order_of(**fields):
    encode(settings_of(**fields), workdir)
    document = DocumentStore(folder / "train_recolor", SETTINGS.vocab)[0]
    written = (folder / "train_count" / "targets.npy").stat().st_mtime
    return [segment.is_image for segment in document.segments], written

  order, written = order_of()
  assert order == [False, True, False, True]
  assert order_of(instruction_first=True) == ([False, False, True, True], written)
  order_of(instruction_first=True, max_records=7)
  assert len(DocumentStore(folder / "train_count", SETTINGS.vocab)) == 7


def test_tokenizers_of_another_config_or_run_are_refused(source, tmp_path):
  workdir = epath.Path(tmp_path)
  vqgan = dataclasses.replace(SETTINGS.vqgan, width=16)
  with refused(UserError, "--init_from", "init_from"):
    copy(dataclasses.replace(SETTINGS, vqgan=vqgan), workdir, source)
  assert not (workdir / "text_tokenizer").exists()
  with refused(UserError, "--init_from", "--bundle"):
    copy(SETTINGS, workdir, tmp_path / "absent")
  with refused(UserError, "base", "sceness", "did you mean 'scenes'?"):
    copy(SETTINGS, workdir, "sceness")
  copy(SETTINGS, workdir, source)
  done = workdir / "vqgan" / stages.DONE
  about = read_json(done)
  done.write_text(done.read_text().replace('"id": "', '"id": "other'))
  with refused(UserError, "done.json", "damaged"):
    copy(SETTINGS, workdir, source)
  about["files"]["config.json"]["sha256"] = "0" * 64
  digests = "".join(described["sha256"] for described in about["files"].values())
  write_json(done, {**about, "id": hashlib.sha256(digests.encode()).hexdigest()[:16]})
  with refused(UserError, "--init_from", "--workdir"):
    copy(SETTINGS, workdir, source)


def test_a_run_without_tasks_is_refused(tmp_path):
  with refused(UserError, "config.instructions", "config.instructions.tasks"):
    encode_instructions.main(SETTINGS, epath.Path(tmp_path), Encoding())


def test_a_tuned_run_needs_its_stores_before_it_trains(source, tmp_path):
  workdir, settings = epath.Path(tmp_path), settings_of()
  copy(settings, workdir, source)
  with one_mesh(), refused(UserError, "--config", "--workdir"):
    train.main(settings, workdir, train.Flags(init_from=str(source)))
