from etils import epath
import pytest

from cm3leon_jax.data.documents import training_data
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run.source import folder_of
from cm3leon_jax.stages import stages
from tests.data.raw_folder import write_raw
from tests.refusals import refused
from tests.reports.run_files import make_image

PAIR = {"key": "a", "caption": "a", "split": "train", "attribution": "b"}


def make_run(folder, license_="", init_from=""):
  """Writes raw data, with a license if one is given, and the config of the run with `init_from`."""
  if license_:
    write_raw(folder / "raw", [{**PAIR, "license": license_}] * 2, [make_image(None, 0)] * 2)
  start = {"source": init_from, "step": None, "digest": "0"} if init_from else None
  write_json(folder / "train" / "config.json", {"run": {"init_from": start}})
  return folder


def licenses(found):
  return [(x["run"], x["license"], x["records"]) for x in found["origins"]]


def test_data_of_all_runs_before_are_listed_through_exports(tmp_path):
  first = make_run(epath.Path(tmp_path / "first"), "MIT")
  second = make_run(epath.Path(tmp_path / "second"), "CC0-1.0", str(first))
  export = epath.Path(tmp_path / "export")
  export.mkdir()
  write_json(export / training_data.FILE, training_data.collect(second))
  third = make_run(epath.Path(tmp_path / "third"), "", str(export))
  found = training_data.collect(third)
  assert licenses(found) == [("second", "CC0-1.0", 2), ("first", "MIT", 2)]
  assert found["runs"] == [
    {"name": "third", "known": False},
    {"name": "second", "known": True},
    {"name": "first", "known": True},
  ]


def test_a_model_without_a_record_is_named_as_unknown(tmp_path):
  run = make_run(epath.Path(tmp_path / "run"), "MIT", str(tmp_path / "weights"))
  found = training_data.collect(run)
  assert found["runs"] == [{"name": "run", "known": True}, {"name": "weights", "known": False}]


def test_imported_weights_have_the_name_of_their_source(tmp_path):
  init = tmp_path / "run" / "init"
  write_json(init / stages.DONE, {"summary": {"imported_from": "/data/Qwen3-0.6B"}})
  run = make_run(epath.Path(tmp_path / "run"), "MIT", str(init))
  assert training_data.collect(run)["runs"][1] == {"name": "Qwen3-0.6B", "known": False}


def test_files_of_instructions_are_named_without_a_license(tmp_path):
  run = make_run(epath.Path(tmp_path / "run"), "MIT")
  summary = {"train_vqa": {"documents": 5}, "heldout_vqa": {"documents": 2}, "seconds": {}}
  for root, expected in (("", []), ("/data/llava/", [("llava", "", 7)])):
    config = {"instructions": {"root": root}}
    write_json(run / "instructions" / stages.DONE, {"config": config, "summary": summary})
    found = training_data.collect(run)["origins"]
    assert [(x["source"], x["license"], x["records"]) for x in found[1:]] == expected


@pytest.mark.parametrize("name", ["scenes", "scenes-instruct"])
def test_a_run_that_began_from_an_installed_model_knows_its_data(tmp_path, name):
  run = make_run(epath.Path(tmp_path / "run"), "MIT", name)
  found = training_data.collect(run, folder_of)
  assert [x["name"] for x in found["runs"]] == ["run", *{name: 0, "scenes": 0}]
  assert all(x["known"] for x in found["runs"])
  assert {x["license"] for x in found["origins"]} == {"MIT", "Apache-2.0"}


@pytest.mark.parametrize(
  "stored",
  [
    3,
    [{"license": "MIT"}],
    {"runs": [], "origins": [{"license": "MIT"}]},
    {"runs": ["a"], "origins": []},
  ],
)
def test_a_damaged_record_is_refused(tmp_path, stored):
  write_json(epath.Path(tmp_path) / training_data.FILE, stored)
  with refused(UserError, training_data.FILE):
    training_data.read(tmp_path)
