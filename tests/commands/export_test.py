import dataclasses
import re
import resource
import shutil
from unittest import mock

from etils import epath
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.commands import export
from cm3leon_jax.config.settings import settings_from_stored
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import bundle, formats, huggingface
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run import bundles, source
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from cm3leon_jax.weights import layouts
from cm3leon_jax.weights.stored import of_tree
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import random_params
from tests.refusals import refused


class Killed(Exception):
  """Simulates a kill."""


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def exported_before(tmp_path):
  """Makes a run whose export and bundle contain other weights than its checkpoint."""
  root = epath.Path(tmp_path / "run")
  save_run(root)
  with one_device():
    params = random_params(SETTINGS.model, seed=1)
    tokenizer = root / "text_tokenizer"
    huggingface.export(root / "export", params, SETTINGS.model, SETTINGS.vocab, tokenizer)
    bundle.write(root / "bundle", Run(root, SETTINGS), params, 3)
  config = stages.run_config(SETTINGS, root, "export")
  config["inputs"]["train"] = "another"
  done = {"id": "e", "config": config, "summary": {}, "seconds": 1.0, "files": {}}
  write_json(root / "export" / stages.DONE, done)
  return root


def test_the_average_is_exported_and_a_bundle_knows_its_cost(tmp_path):
  """Exports the average, because the last parameters are NaN (see `save_run`)."""
  save_run(tmp_path)
  export.main(SETTINGS, tmp_path, export.Flags(bundle=str(tmp_path / "bundle")))
  with one_device():
    average = random_params(SETTINGS.model)
  found = safetensors.load_file(tmp_path / "export" / huggingface.WEIGHTS)
  expected = {
    t.name: t.make() for t in layouts.tensors_of(layouts.LAYOUTS["opt"], of_tree(average))
  }
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor)
  # `save_run` records one second for each stage.
  cost = {"train_seconds": 1.0, "other_seconds": 5.0, "machine": None}
  assert bundles.about(tmp_path / "bundle")["cost"] == cost


def with_model(settings, **fields):
  return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **fields))


@pytest.fixture(scope="module")
def gelu(tmp_path_factory):
  settings = with_model(SETTINGS, activation="gelu_tanh")
  root = epath.Path(tmp_path_factory.mktemp("gelu"))
  save_run(root, settings)
  return settings, root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_in_any_dtype_has_the_logits_of_its_rounded_parameters(
  gelu, tmp_path, capsys, dtype
):
  pytest.importorskip("torch")
  settings, root = gelu
  output = tmp_path / "out"
  flags = export.Flags(dtype=dtype, output=str(output))
  export.main(settings, root, flags)
  message = capsys.readouterr().out
  assert "export: OPTForCausalLM, " in message
  assert float(re.search(r"differ by at most (\S+)", message)[1]) < 1e-4
  assert ("bits per image code" in message) == (dtype != "float32")
  described = read_json(output / "export.json")
  assert settings_from_stored(described.pop("settings")) == settings
  assert described == {**vars(flags.choice), "average": True, "step": 7}
  assert read_json(output / "config.json")["dtype"] == dtype
  assert not (root / "export").exists()


def test_int8_prints_its_effect_on_heldout_bits(gelu, tmp_path, capsys):
  pytest.importorskip("compressed_tensors")
  settings, root = gelu
  export.main(settings, root, export.Flags(quantize="int8", output=str(tmp_path / "out")))
  message = capsys.readouterr().out
  before, after = map(
    float, re.search(r"int8: (\S+) -> (\S+) bits per image code", message).groups()
  )
  assert before != after
  assert abs(before - after) < 0.1 * before
  assert float(re.search(r"differ by at most (\S+)", message)[1]) < 1e-4


def test_a_run_without_documents_is_exported_without_a_comparison(gelu, tmp_path, capsys):
  settings, root = gelu
  run = epath.Path(tmp_path / "run")
  shutil.copytree(root, run, ignore=shutil.ignore_patterns("documents"))
  sampling = dataclasses.replace(settings.sampling, method="contrastive")
  export.main(dataclasses.replace(settings, sampling=sampling), run, export.Flags())
  message = capsys.readouterr().out
  assert "not compared: a run without documents has no held-out" in message
  assert "sampling.method is contrastive, but the export samples by top-k and top-p" in message
  assert stages.require(run, "export")


def test_the_stage_is_made_again_in_another_format_and_skipped_in_the_same(gelu, capsys):
  settings, root = gelu
  for name, expected in (("orbax", "orbax, "), ("orbax", "skipped"), ("hf", "OPTFor")):
    export.main(settings, root, export.Flags(format=name))
    assert expected in capsys.readouterr().out
  assert (root / "export" / huggingface.WEIGHTS).exists()
  assert not (root / "export" / "params").exists()
  shutil.rmtree(root / "export")


def test_the_last_parameters_are_written_if_they_are_asked_for(gelu, tmp_path):
  """Tries to export the last parameters, which are NaN (see `save_run`) and therefore rejected."""
  settings, root = gelu
  output = str(tmp_path / "out")
  with refused(UserError, "--dtype", "embed_tokens.weight"):
    export.main(settings, root, export.Flags(merge_ema=False, output=output))
  assert not (tmp_path / "out").exists()


def test_what_a_format_lacks_is_refused_by_name_and_an_earlier_export_stays(exported_before):
  before = contents(exported_before / "export")
  for settings, flags in (
    (with_model(SETTINGS, query_key_norm=True), export.Flags()),
    (SETTINGS, export.Flags(format="orbax", quantize="int8")),
  ):
    with refused(UserError, "format"):
      export.main(settings, exported_before, flags)
  assert contents(exported_before / "export") == before


@pytest.mark.parametrize("output", ["", "out"])
def test_another_config_or_no_workdir_is_refused_without_advice_to_delete(gelu, tmp_path, output):
  settings, root = gelu
  output = output and str(tmp_path / output)
  before = contents(root / "train")
  with refused(UserError, "--config", "--workdir"):
    export.main(with_model(settings, width=64), root, export.Flags(output=output))
  absent = epath.Path(tmp_path / "absent")
  with refused(UserError, "workdir", "installed"):
    export.main(settings, absent, export.Flags(output=output))
  assert list(tmp_path.iterdir()) == []
  assert contents(root / "train") == before
  assert not (root / "export").exists()


def test_an_output_replaces_an_export_and_nothing_else(gelu, tmp_path, monkeypatch):
  settings, root = gelu
  output = tmp_path / "out"
  orbax = export.Flags(format="orbax", output=str(output))
  output.mkdir()
  export.main(settings, root, orbax)
  before = contents(output)
  with monkeypatch.context() as patch:
    patch.setattr(formats, "write", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
      export.main(settings, root, orbax)
  assert contents(output) == before
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  # As after a kill between the two renames of an export.
  output.rename(tmp_path / "out.old")
  with monkeypatch.context() as patch:
    patch.setattr(formats, "write", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
      export.main(settings, root, orbax)
  assert contents(output) == before
  export.main(settings, root, export.Flags(format="orbax", dtype="float16", output=str(output)))
  assert contents(output) != before
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  (output / source.ABOUT).unlink()
  with refused(UserError, "--output", "another"):
    export.main(settings, root, orbax)
  with refused(UserError, "--output", "workdir"):
    export.main(settings, root, export.Flags(format="orbax", output="gs://bucket/out"))


def test_an_export_on_a_full_disk_counts_as_none(exported_before, monkeypatch):
  monkeypatch.setattr(huggingface, "can_compare", lambda quantized: False)
  target = str(exported_before / "bundle")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      export.main(SETTINGS, exported_before, export.Flags(bundle=target))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not (exported_before / "export" / stages.DONE).exists()
  assert not (exported_before / "export" / huggingface.WEIGHTS).exists()
  assert bundles.read(epath.Path(target))[1] == 3  # The export did not change the bundle.
  export.main(SETTINGS, exported_before, export.Flags(bundle=target))
  assert bundles.read(epath.Path(target))[1] == 7
