import dataclasses
import shutil

import jax
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.export import huggingface
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import load_initial
from cm3leon_jax.stages import table
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import mesh_of, random_params
from tests.refusals import refused


def with_model(**fields):
  return dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, **fields))


@pytest.fixture(params=["opt", "modern"])
def exported(request, tmp_path):
  """Returns settings, their parameters, and the folder of the exported parameters."""
  settings = with_model(family=request.param)
  with one_device():
    params = random_params(settings.model, seed=3)
    huggingface.export(tmp_path, params, settings.model, settings.vocab, None)
  return settings, jax.device_get(params), tmp_path


def test_the_average_of_a_run_is_found_and_loaded_onto_any_mesh(run):
  found = initial.find(SETTINGS, str(run))
  assert (found.source, found.step) == (str(run), 7)
  with one_device():
    expected = jax.device_get(random_params(SETTINGS.model))
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params = load_initial(found, SETTINGS)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_an_exported_model_is_loaded_as_it_was_and_split_over_the_mesh(exported):
  settings, expected, folder = exported
  found = initial.find(settings, str(folder))
  assert found.step is None
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params, split = load_initial(found, settings), random_params(settings.model)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(split)):
    assert (x.sharding, x.dtype) == (y.sharding, y.dtype)


def test_another_model_or_vocabulary_is_refused_with_its_fields(run, exported):
  with refused(UserError, "mlp_width"):
    initial.find(with_model(mlp_width=64), str(run))
  settings, _, folder = exported
  model = dataclasses.replace(settings.model, num_heads=4, max_positions=256)
  vocab = dataclasses.replace(settings.vocab, num_special=settings.vocab.num_special + 1)
  with refused(UserError, str(folder), "num_heads"):
    initial.find(dataclasses.replace(settings, model=model, vocab=vocab), str(folder))


def test_parameters_with_rotary_positions_fit_any_number_of_positions(exported, tmp_path):
  settings, _, folder = exported
  model = dataclasses.replace(settings.model, max_positions=999)
  other = dataclasses.replace(settings, model=model)
  if settings.model.family == "opt":  # Its positions are parameters.
    with pytest.raises(UserError, match="max_positions"):
      initial.find(other, str(folder))
  else:
    with one_device():
      params = load_initial(initial.find(other, str(folder)), other)
      expected = load_initial(initial.find(settings, str(folder)), settings)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_image_tokenizer_of_an_export_is_compared(run, tmp_path):
  shutil.copytree(run / "vqgan", tmp_path / "image_tokenizer")
  assert initial.other_tokenizers(str(tmp_path), run) == []
  path = tmp_path / "image_tokenizer" / "params.safetensors"
  path.write_bytes(path.read_bytes() + b" ")
  assert initial.other_tokenizers(str(tmp_path), run) == ["image tokenizer"]


def test_a_checkpoint_of_the_same_step_that_was_trained_anew_is_refused(run, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(run, copy)
  found = initial.find(SETTINGS, str(copy))
  digests = copy / "train" / "checkpoints.digests" / "7.json"
  digests.write_text(digests.read_text() + " ")
  with one_device(), refused(UserError, found.source):
    load_initial(found, SETTINGS)


def test_a_run_remembers_where_it_began(run, tmp_path, capsys):
  def start(source, stored):
    return initial.of_run(SETTINGS, tmp_path, source, stored)

  assert start("", None) is None
  begun = start(str(run), None)
  assert f"starts from the parameters of {run}, step 7" in capsys.readouterr().out
  stored = table.identity(SETTINGS, "train") | {"init_from": dataclasses.asdict(begun)}
  assert start("", stored) == start(str(run), stored) == begun
  with refused(UserError, "other"):
    start("other", stored)
  del stored["init_from"]
  assert start("", stored) is None
  with refused(UserError, str(run)):
    start(str(run), stored)


def test_other_tokenizers_are_named(run, tmp_path, capsys):
  assert initial.other_tokenizers(str(run), run) == []
  for name in ("text_tokenizer", "vqgan"):
    shutil.copytree(run / name, tmp_path / name)
  assert initial.other_tokenizers(str(run), tmp_path) == []
  for path in ("text_tokenizer/tokenizer.json", "vqgan/params.safetensors"):
    (tmp_path / path).write_bytes((tmp_path / path).read_bytes() + b" ")
  expected = ["text tokenizer", "image tokenizer"]
  assert initial.other_tokenizers(str(run), tmp_path) == expected
  assert initial.other_tokenizers(str(run / "text_tokenizer"), tmp_path) == expected[:1]
  initial.of_run(SETTINGS, tmp_path, str(run), None)
  assert "was trained with another text tokenizer than the one in" in capsys.readouterr().out


def test_a_run_has_cost_what_the_runs_before_it_cost(tmp_path):
  def trained(name, seconds, source):
    init_from = source and {"source": str(source), "step": 1, "digest": ""}
    (tmp_path / name / "train").mkdir(parents=True)
    write_json(tmp_path / name / "train" / "config.json", {"run": {"init_from": init_from}})
    write_json(tmp_path / name / "train" / "done.json", {"seconds": seconds})
    return tmp_path / name

  first = trained("first", 40.0, None)
  second = trained("second", 2.0, first)
  third = trained("third", 1.0, second)
  assert [initial.seconds_before(run) for run in (first, second, third)] == [0.0, 40.0, 42.0]
  gone = trained("gone", 1.0, tmp_path / "deleted")
  assert initial.seconds_before(gone) == 0.0
  shutil.rmtree(second / "train")
  about = {"settings": {}, "step": 1, "digests": {}, "cost": {"train_seconds": 7.0}}
  write_json(second / "bundle.json", about)
  assert initial.seconds_before(third) == 7.0
