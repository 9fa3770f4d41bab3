import dataclasses
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from cm3leon_jax.commands import common, evaluate
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.configs import defaults
from cm3leon_jax.data.documents import store
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.stages import stages, table
from cm3leon_jax.training.step import optimizer, state
from cm3leon_jax.weights import checkpoint
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors


def tiny_settings():
  config = defaults.get_config()
  config.vocab.update({"num_special": 8, "text_size": 272, "image_size": 16})
  config.vqgan = ml_collections.ConfigDict()
  config.data.update({"sequence_length": 64})
  config.model.update({"vocab_size": 288, "num_layers": 1, "width": 8, "num_heads": 1})
  config.model.update({"mlp_width": 8, "max_positions": 64})
  config.model.update({"dtype": "float32", "remat_policy": "none"})
  config.evaluation.update({"num_documents": 4, "num_resamples": 100})
  return settings_from_config(config)


def write_store(folder, n, vocab, seed):
  rng, written = np.random.default_rng(seed), []
  for i in range(n):
    ids = rng.integers(vocab.num_special, vocab.text_size, 3).astype(np.int32)
    codes = vocab.image_ids(rng.integers(0, vocab.image_size, 4))
    segments = store.Segment(False, ids), store.Segment(True, codes)
    written.append(store.Document(str(i), segments, "s", "l", "a"))
  store.write_documents(folder, written, vocab)


@pytest.fixture
def workdir(tmp_path):
  """Writes the files that an evaluation reads. Last parameters are NaN; their average is random."""
  settings = tiny_settings()
  write_store(tmp_path / "documents" / "train_pairs", 9, settings.vocab, 0)
  write_store(tmp_path / "documents" / "heldout_pairs", 5, settings.vocab, 1)
  ids = np.random.default_rng(2).integers(0, 9, (5, 4)).astype(np.int32)
  write_neighbors(
    tmp_path / "neighbors" / "heldout_pairs", ids=np.full((5, 4), -1, np.int32), text_ids=ids
  )
  with jax.set_mesh(create_mesh(settings.mesh)):
    create = jax.jit(state.init_state, static_argnums=(0, 1))
    adam = optimizer.create_optimizer(settings.optimizer, 10)
    checkpoints = checkpoint.Checkpoints(tmp_path / "train", keep=1)
    begun = create(settings.model, adam, jax.random.key(0))
    params = jax.tree.map(lambda x: np.nan * x, begun.params)
    checkpoints.save(dataclasses.replace(begun, params=params, ema=begun.params), 7, 0)
    checkpoints.close()
  write_json(tmp_path / "train" / "config.json", {"run": table.identity(settings, "train")})
  for folder in ("documents", "neighbors", "train"):
    with stages.once(tmp_path / folder, {}):
      pass
  return tmp_path


@pytest.mark.slow
def test_the_last_parameters_are_measured_apart_from_their_average(workdir):
  """The last parameters are NaN, so their evaluation fails and is not marked as finished."""
  evaluate.main(tiny_settings(), workdir, evaluate.Flags())
  with refused(UserError, "NaNs", "step 7"):
    evaluate.main(tiny_settings(), workdir, evaluate.Flags(last_params=True))
  assert read_json(workdir / "evaluation" / "metrics.json")["image"]["true"]["bits"] > 0
  assert not (workdir / "evaluation_last" / stages.DONE).exists()


def test_evaluate_writes_its_numbers_once_and_again_after_more_training(workdir, capsys):
  evaluate.main(tiny_settings(), workdir, evaluate.Flags())
  found = read_json(workdir / "evaluation" / "metrics.json")
  assert found["step"] == 7
  assert found["documents"] == 4
  # The caption has two neighbors. The image's neighbors are all -1 (none) and do not count.
  assert found["mean_neighbors"]["true"] == 2.0
  assert found["image"]["tokens"] == 16
  # An untrained decoder predicts a nearly uniform distribution over the whole vocabulary.
  assert found["image"]["true"]["bits"] == pytest.approx(np.log2(288), abs=0.05)
  assert "bits per image code" in capsys.readouterr().out
  evaluate.main(tiny_settings(), workdir, evaluate.Flags())
  assert "finished already, skipped" in capsys.readouterr().out
  with stages.once(workdir / "train", {}, redo=True):
    pass
  evaluate.main(tiny_settings(), workdir, evaluate.Flags())
  assert stages.require(workdir, "evaluation")["summary"] == found
  assert "skipped" not in capsys.readouterr().out


def test_sampling_flags_are_refused_if_nothing_is_sampled(workdir):
  with refused(UserError, "--temperature", "--protocol"):
    evaluate.main(tiny_settings(), workdir, evaluate.Flags(sampling={"temperature": 0.5}))


def test_the_run_of_another_model_is_refused(workdir):
  settings = tiny_settings()
  other = dataclasses.replace(settings, model=dataclasses.replace(settings.model, family="modern"))
  with refused(UserError, "--config", "--workdir"):
    evaluate.main(other, workdir, evaluate.Flags())


def test_a_batch_that_the_mesh_does_not_split_is_refused_before_params_are_read(workdir):
  settings = tiny_settings()
  evaluation = dataclasses.replace(settings.evaluation, batch_size=12)
  settings = dataclasses.replace(settings, evaluation=evaluation)
  shutil.rmtree(workdir / "train" / "checkpoints")
  with refused(UserError, "config.evaluation.batch_size", "batch_size"):
    evaluate.main(settings, workdir, evaluate.Flags())


def test_a_mesh_that_splits_parameters_unevenly_is_refused():
  settings = dataclasses.replace(tiny_settings(), mesh=MeshConfig(1, -1, 1))
  model = dataclasses.replace(settings.model, width=36, num_heads=4, mlp_width=64)
  with refused(UserError, "--config.mesh.fsdp", "--config.mesh.fsdp_inner"):
    common.make_mesh(dataclasses.replace(settings, model=model))
  common.make_mesh(settings)
