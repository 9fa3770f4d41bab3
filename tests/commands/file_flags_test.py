import dataclasses
import json
import pathlib

from etils import epath
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from cm3leon_jax.commands import common, evaluate, export, generate, score
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import bundle
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.run.run import Run
from cm3leon_jax.run.source import folder_of
from cm3leon_jax.weights import reading
from tests.generation.run import SETTINGS, one_device, save_run
from tests.launched import cm3leon
from tests.refusals import refused

PROTOCOL = """
title: captions
task: text
template: "<mask>"
data: {format: coco_karpathy, split: test, count: 0}
columns: [{name: greedy, length: 3, sampling: {text_top_k: 1}}]
metrics: [exact_match]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("models") / "run")
  save_run(root)
  return root


@pytest.fixture(scope="module")
def bundled(run):
  """Makes a bundle of `run`, which has no bank."""
  folder, data = run.parent / "bundled", dataclasses.replace(SETTINGS.data, num_neighbors=0)
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    bundle.write(folder, Run(run, dataclasses.replace(SETTINGS, data=data)), params, step)
  return folder


@pytest.fixture
def documents(tmp_path):
  path = tmp_path / "my.jsonl"
  path.write_text('{"text": "red apple"}\n')
  return path


@pytest.fixture
def protocol(tmp_path):
  """Returns the flags of an evaluation whose protocol has the captions of two images."""
  rng, images = np.random.default_rng(0), []
  for i in range(2):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    entry = {"filepath": ".", "filename": f"{i}.jpg", "split": "test", "imgid": i, "cocoid": i}
    images.append({**entry, "sentences": [{"raw": "red apple"}]})
  (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
  (tmp_path / "own.yaml").write_text(PROTOCOL)
  return {"protocol": str(tmp_path / "own.yaml"), "data": str(tmp_path)}


def names(folder):
  folder = pathlib.Path(folder)
  return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def call(monkeypatch, tmp_path):
  here = tmp_path / "here"
  here.mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())

  def run_command(command, folder, **values):
    command.main(Run.open(folder).settings, folder, command.Flags(**values))
    return here

  return run_command


@pytest.mark.slow
def test_a_bundled_model_draws_without_a_config_into_the_current_folder(tmp_path):
  installed = folder_of("scenes")
  before = names(installed)
  done = cm3leon("generate", "--workdir=scenes", "--prompt=a red bell", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  (folder,) = (tmp_path / "prompts").glob("a-red-bell-*")
  assert f"generate: results in {folder.relative_to(tmp_path)}, " in done.stdout
  assert len(done.stdout.splitlines()) == 2  # The CLIP score of the sample is the other line.
  (file,) = folder.glob("000_*.png")
  # The image shows a red bell on white, so the red channel has the largest mean.
  red, green, blue = np.asarray(Image.open(file), float).mean((0, 1))
  assert red > max(green, blue) + 5
  assert names(installed) == before


def test_results_of_a_bundle_go_to_the_current_folder_or_to_out(
  call, bundled, documents, protocol, tmp_path
):
  before, there = names(bundled), tmp_path / "there"
  for pattern, command, values in (
    ("prompts/red-apple-*/*.png", generate, {"prompt": ["red apple"]}),
    ("scores/my-*/summary.json", score, {"documents": str(documents)}),
    ("evaluations/own-*/report.html", evaluate, protocol),
  ):
    here = call(command, bundled, **values)
    assert list(here.glob(pattern))
    call(command, bundled, **values, out=str(there))
    assert list(there.glob(pattern))
  assert names(bundled) == before


def test_a_bundle_is_exported_like_its_run(call, bundled, capsys):
  exported = call(export, bundled) / "export"
  assert "not compared: a bundle has no held-out documents" in capsys.readouterr().out
  assert {"README.md", "model.safetensors", "training_data.json"} <= names(exported)
  assert read_json(exported / "export.json")["step"] == 7
  found, stored = (load_file(folder / "model.safetensors") for folder in (exported, bundled))
  assert found.keys() == stored.keys()
  for name, tensor in stored.items():
    np.testing.assert_array_equal(found[name], tensor.astype(np.float32))


MISTAKES = [
  (generate, {}, "held-out captions"),
  (evaluate, {}, "held-out documents"),
  (score, {"documents": "{texts}", "retrieve": ["1"]}, "--retrieve"),
  (evaluate, {"out": "x"}, "--out"),
]


@pytest.mark.parametrize(("command", "values", "fact"), MISTAKES)
def test_what_a_bundle_lacks_is_one_sentence(call, bundled, documents, command, values, fact):
  values = {k: v.format(texts=documents) if isinstance(v, str) else v for k, v in values.items()}
  with refused(UserError, fact):
    call(command, bundled, **values)


def test_a_bundle_is_neither_bundled_again_nor_exported_without_its_average(call, bundled):
  with refused(UserError, "--bundle", "bundled"):
    call(export, bundled, bundle="b")
  with refused(UserError, "--merge_ema", "merge_ema"):
    call(export, bundled, merge_ema=True)
