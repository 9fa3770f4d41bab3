"""Tests where a tuning finds the documents of its base."""

import dataclasses
import importlib

from etils import epath
import pytest

from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.trained import base_documents


def settings_of(name, **fields):
  config = importlib.import_module(f"cm3leon_jax.configs.{name}").get_config()
  config.update_from_flattened_dict(fields)
  return settings_from_config(config)


@pytest.fixture
def workdir(tmp_path):
  folder = epath.Path(tmp_path)
  settings = dataclasses.asdict(settings_of("scenes"))
  (folder / "train").mkdir()
  write_json(folder / "train" / "config.json", {"run": {}, "settings": settings})
  return folder


def finish(folder, name):
  (folder / name).mkdir()
  write_json(folder / name / stages.DONE, {})


def test_a_bundle_has_no_folder_of_documents_but_its_world_can_draw_them(tmp_path):
  settings, folder = base_documents.find("scenes")
  assert folder is None
  assert base_documents.can_draw(settings)
  run = settings_of("scenes", **{"data.base_documents": 9})
  drawn = base_documents.to_draw(settings, run, tmp_path)
  assert drawn.folder == epath.Path(tmp_path) / "base"
  assert (drawn.settings.scenes.train, drawn.settings.scenes.heldout) == (9, 400)
  own = dataclasses.replace(settings, raw=dataclasses.replace(settings.raw, source="my_images"))
  assert not base_documents.can_draw(own)


def test_the_folder_of_a_workdir_is_named_once_its_documents_and_neighbors_are_finished(workdir):
  finish(workdir, "documents")
  assert base_documents.find(str(workdir))[1] is None
  finish(workdir, "neighbors")
  assert base_documents.find(str(workdir))[1] == workdir


def test_documents_that_exist_or_can_be_drawn_are_replayed_but_not_with_other_image_codes(workdir):
  for name in base_documents.READ:
    finish(workdir, name)
  for source in (str(workdir), "scenes"):
    for own_images in (False, True):
      fields = base_documents.fields(source, own_images)
      assert (fields["data.base_share"] > 0) == (not own_images)
      assert (fields["data.base_documents"] > 0) == (not own_images)
