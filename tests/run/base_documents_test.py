"""Tests where a tuning finds the documents of its base."""

import dataclasses

from etils import epath
import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run import base_documents, bundles
from cm3leon_jax.run.rows import document_sources
from cm3leon_jax.run.source import folder_of
from cm3leon_jax.stages import stages
from examples.illustrations import config as illustrations
from tests.launched import SCENES


def settings_of(name, **fields):
  config = config_file.load(name)
  config.update_from_flattened_dict(fields)
  return settings_from_config(config)


@pytest.fixture
def workdir(tmp_path):
  folder = epath.Path(tmp_path)
  settings = dataclasses.asdict(settings_of(SCENES))
  (folder / "train").mkdir()
  write_json(folder / "train" / "config.json", {"run": {}, "settings": settings})
  return folder


def finish(folder, name):
  (folder / name).mkdir()
  write_json(folder / name / stages.DONE, {})


@pytest.mark.parametrize("name", ["scenes", "scenes-instruct"])
def test_the_bundled_models_have_documents_with_neighbors_and_none_is_held_out_and_trained(name):
  settings, folder = base_documents.find(name)
  captions = []
  for split, number in (("train", 4_000), ("heldout", 400)):
    [source] = document_sources(settings, folder, split, 1.0)
    pairs = [source.store[i] for i in range(len(source.store))]
    assert len(pairs) == number
    assert 0.2 < (source.neighbors[:, 0] >= 0).mean() < 0.5
    captions.append({pair.key for pair in pairs} | {str(pair.facts["objects"]) for pair in pairs})
  assert not captions[0] & captions[1]


def test_a_bundle_without_documents_is_neither_replayed_nor_measured(tmp_path):
  stored = read_json(folder_of("scenes") / bundles.FILE)
  write_json(epath.Path(tmp_path) / bundles.FILE, {**stored, "digests": {}})
  fields = base_documents.fields(str(tmp_path), False)
  assert (fields["data.base_documents"], fields["data.base_share"]) == (0, 0)


def test_a_base_with_a_tokenizer_for_any_image_leaves_the_batch_to_the_data(workdir):
  path = workdir / "train" / "config.json"
  settings = dataclasses.asdict(settings_from_config(illustrations.get_config()))
  write_json(path, {"run": {}, "settings": settings})
  kept, own = (base_documents.fields(str(workdir), own_images) for own_images in (False, True))
  names = {name for name in kept if name.startswith("vqgan.")}
  assert kept["vqgan.source"] == "pictures"
  assert "vqgan.batch_size" not in names
  assert {**own, **{name: kept[name] for name in names}} == kept
  assert {k: v for k, v in own.items() if k in names} == {"vqgan.source": ""}


def test_the_folder_of_a_workdir_is_named_once_its_documents_and_neighbors_are_finished(workdir):
  finish(workdir, "documents")
  assert base_documents.find(str(workdir))[1] is None
  finish(workdir, "neighbors")
  assert base_documents.find(str(workdir))[1] == workdir


def test_documents_that_exist_are_replayed_but_not_with_other_image_codes(workdir):
  for name in base_documents.READ:
    finish(workdir, name)
  for source in (str(workdir), "scenes"):
    for own_images in (False, True):
      fields = base_documents.fields(source, own_images)
      assert (fields["data.base_share"] > 0) == (not own_images)
      assert (fields["data.base_documents"] > 0) == (not own_images)
