import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.commands import export, import_vqgan
from cm3leon_jax.files import progress
from cm3leon_jax.importing import importer
from cm3leon_jax.run import initial
from tests.generation.run import SETTINGS
from tests.refusals import refused

PROMPT = "red apple"


@pytest.fixture(scope="module")
def model(run):
  return CM3Leon.load(run, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
  root = tmp_path_factory.mktemp("exports")
  for name in ("hf", "orbax"):
    export.main(SETTINGS, run, export.Flags(format=name, output=str(root / name)))
  return root


def tokens(model, **options):
  return model.generate(PROMPT, retrieve=0, **options)[0].tokens.tolist()


def test_devices_and_dtype_are_those_that_are_asked_for(run, model):
  assert [d.id for d in model.mesh.devices.flat] == [jax.devices()[0].id]
  narrow = CM3Leon.load(run, devices=jax.devices()[2:4], dtype="bfloat16")
  assert {d.id for d in narrow.mesh.devices.flat} == {d.id for d in jax.devices()[2:4]}
  assert model.pipeline.settings.model.dtype == "float32"
  assert narrow.pipeline.settings.model.dtype == "bfloat16"
  assert str(narrow.pipeline.generator.params.head.dtype) == "bfloat16"
  assert CM3Leon.load(run, dtype=jax.numpy.bfloat16).pipeline.settings.model.dtype == "bfloat16"


@pytest.mark.parametrize("shown", [True, False])
def test_progress_shows_by_default_where_somebody_looks(run, monkeypatch, shown):
  monkeypatch.setattr(progress, "is_interactive", lambda: shown)
  devices = jax.devices()[:1]
  assert CM3Leon.load(run, devices=devices).show_progress is shown
  assert CM3Leon.load(run, devices=devices, show_progress=not shown).show_progress is not shown


@pytest.mark.parametrize("name", ["hf", "orbax"])
def test_an_export_generates_what_its_run_does(model, exports, name):
  loaded = CM3Leon.load(exports / name, devices=jax.devices()[:1])
  assert loaded.step == 7
  assert tokens(loaded, seed=3) == tokens(model, seed=3)
  [sample] = loaded.generate(PROMPT)
  assert (sample.clip_score, sample.neighbors) == (None, ())
  image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
  assert loaded.score(PROMPT, image).text == pytest.approx(
    model.score(PROMPT, image).text, rel=1e-5
  )
  for call, fact in (
    (lambda: loaded.generate(PROMPT, num_samples=2, rank=True), "CLIP"),
    (lambda: loaded.generate(PROMPT, retrieve=1), "no bank"),
    (lambda: loaded.retrieve(PROMPT), "no bank"),
    (lambda: loaded.score(PROMPT, image, retrieve=1), "no bank"),
  ):
    with refused(UserError, fact):
      call()


def test_an_export_for_other_programs_is_refused(run, tmp_path):
  other = tmp_path / "int8"
  export.main(SETTINGS, run, export.Flags(quantize="int8", output=str(other)))
  with refused(UserError, str(other)):
    CM3Leon.load(other)


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
    given = import_vqgan.Flags(source=source)
    reads.append(lambda: import_vqgan.main(SETTINGS, tmp_path / "run", given))
  for read in reads:
    with pytest.raises(UserError, match=f"/{file} has changed since it was written"):
      read()
