import os
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.commands import export, import_vqgan
from cm3leon_jax.export import formats
from cm3leon_jax.importing import importer
from cm3leon_jax.trained import bundles, initial
from tests.export.conftest import run  # noqa: F401
from tests.generation.run import SETTINGS
from tests.refusals import refused

PROMPT = "red apple"
WRITTEN = {"hf": formats.Choice(), "orbax": formats.Choice("orbax")}


@pytest.fixture(scope="module")
def model(run):  # noqa: F811
  return CM3Leon.load(run, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):  # noqa: F811
  root = tmp_path_factory.mktemp("exports")
  for name, choice in WRITTEN.items():
    export.main(SETTINGS, run, choice=choice, output=str(root / name))
  return root


def tokens(model, **options):
  return model.generate(PROMPT, retrieve=0, **options)[0].tokens.tolist()


def test_devices_and_dtype_are_those_that_are_asked_for(run, model):  # noqa: F811
  assert [d.id for d in model.mesh.devices.flat] == [jax.devices()[0].id]
  narrow = CM3Leon.load(run, devices=jax.devices()[2:4], dtype="bfloat16")
  assert {d.id for d in narrow.mesh.devices.flat} == {d.id for d in jax.devices()[2:4]}
  assert model.pipeline.settings.model.dtype == "float32"
  assert narrow.pipeline.settings.model.dtype == "bfloat16"
  assert str(narrow.pipeline.generator.params.head.dtype) == "bfloat16"
  assert CM3Leon.load(run, dtype=jax.numpy.bfloat16).pipeline.settings.model.dtype == "bfloat16"


def test_a_model_is_described_in_one_line(run, model):  # noqa: F811
  text = repr(model)
  assert text.startswith(f"CM3Leon({str(run)!r}, step 7, ")
  assert text.endswith(" parameters, images of 8 x 8, float32 on 1 cpu)")
  assert "\n" not in text
  bundled = CM3Leon(os.fspath(bundles.folder_of("scenes")), model.pipeline, model.mesh, 7)
  assert repr(bundled).startswith("CM3Leon('scenes', step 7, ")


@pytest.mark.parametrize("name", WRITTEN)
def test_an_export_generates_what_its_run_does(model, exports, name):
  with pytest.warns(UserWarning, match="is an export, which has neither CLIP nor bank: samples"):
    loaded = CM3Leon.load(exports / name, devices=jax.devices()[:1])
  assert loaded.step == 7
  assert tokens(loaded, seed=3) == tokens(model, seed=3)
  [sample] = loaded.generate(PROMPT)
  assert (sample.clip_score, sample.neighbors) == (None, ())
  image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
  assert loaded.score(PROMPT, image).text == pytest.approx(
    model.score(PROMPT, image).text, rel=1e-5
  )
  for call in (
    lambda: loaded.generate(PROMPT, num_samples=2, rank=True),
    lambda: loaded.generate(PROMPT, retrieve=1),
    lambda: loaded.retrieve(PROMPT),
    lambda: loaded.score(PROMPT, image, retrieve=1),
    lambda: loaded.save(exports / "saved"),
  ):
    with pytest.raises(UserError, match=r"CLIP|bank|export"):
      call()


IMAGES = "image_tokenizer/params.safetensors"


@pytest.mark.parametrize(
  ("name", "file"),
  [("hf", "model.safetensors"), ("hf", IMAGES), ("orbax", "tokenizer.json"), ("orbax", IMAGES)],
)
def test_a_changed_file_of_an_export_is_named(exports, tmp_path, name, file):
  folder = shutil.copytree(exports / name, tmp_path / name)
  content = bytearray((folder / file).read_bytes())
  content[-9] ^= 1
  (folder / file).write_bytes(content)
  reads = [lambda: CM3Leon.load(folder), lambda: initial.find(SETTINGS, str(folder))]
  if name == "hf":
    reads.append(lambda: importer.plan(SETTINGS, str(folder)))
  if file == IMAGES:
    source = str((folder / file).parent)
    reads.append(lambda: import_vqgan.main(SETTINGS, tmp_path / "run", source, None))
  for read in reads:
    with pytest.raises(UserError, match=f"/{file} has changed since it was written"):
      read()


def test_a_saved_model_is_a_bundle_that_generates_alike_and_is_saved_again(model, run, tmp_path):  # noqa: F811
  model.save(tmp_path / "a")
  saved = CM3Leon.load(tmp_path / "a", devices=jax.devices()[:1])
  assert bundles.about(tmp_path / "a")["cost"]["train_seconds"] == 1.0
  saved.save(tmp_path / "b")
  again = CM3Leon.load(tmp_path / "b", devices=jax.devices()[:1])
  assert tokens(again) == tokens(saved)
  assert saved.step == again.step == 7
  with refused(UserError, str(tmp_path / "a")):
    saved.save(tmp_path / "a")
  for one in (model, saved):
    with refused(UserError, str(run)):
      one.save(run)
