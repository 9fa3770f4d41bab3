"""Compares an export in the format peft with `peft` itself, and reads it again."""

import dataclasses

from etils import epath
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.config import UserError
from cm3leon_jax.export import formats, huggingface, peft_adapter
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.models import adapters
from cm3leon_jax.models.config import AdapterConfig
from cm3leon_jax.runs import table
from cm3leon_jax.trained.adapters import open_at
from cm3leon_jax.trained.run import Run
from cm3leon_jax.weights import adapter_tensors, stored
from tests.generation.run import SETTINGS, one_device
from tests.models.adapters_test import random_factors
from tests.models.tiny import mesh_of, model_logits, random_params
from tests.refusals import refused

CHOICES = {
  "opt-all": ("opt", AdapterConfig(rank=3, alpha=6.0)),
  "modern-all": ("modern", AdapterConfig(rank=3, alpha=6.0)),
  "modern-two": ("modern", AdapterConfig(rank=2, alpha=8.0, targets=("v", "down"))),
  "opt-rows": ("opt", AdapterConfig(rank=2, targets=("v",), tokens=("300:310", "5:7"))),
  "modern-rows": ("modern", AdapterConfig(rank=2, targets=("v",), tokens=("300:310", "5:7"))),
}


@pytest.fixture(params=CHOICES, ids=str)
def exported(request, tmp_path):
  """Returns (settings, base, adapters, folder of the export)."""
  family, adapter = CHOICES[request.param]
  model = dataclasses.replace(SETTINGS.model, family=family, num_layers=2)
  settings = dataclasses.replace(SETTINGS, model=model, adapter=adapter)
  run, folder = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "peft")
  begun = {"source": str(tmp_path / "base"), "step": 7, "digest": "0" * 64}
  identity = {**table.identity(settings, "train"), "init_from": begun}
  write_json(
    run / "train" / "config.json", {"run": identity, "settings": dataclasses.asdict(settings)}
  )
  with one_device():
    base, factors = random_params(model), random_factors(model, adapter)
    sums = {"sums": peft_adapter.sums(base, factors, adapter)} if adapter.tokens else {}
  base, factors = jax.device_get((base, factors))
  choice = formats.Choice(format="peft")
  of_run = formats.TrainedRun(Run(run, settings), stored.of_tree(factors | sums, 3), choice)
  numbers = formats.write(folder, of_run)
  assert numbers["parameters"] == adapters.count(model, adapter)
  return settings, base, factors, folder


def test_the_adapters_are_read_as_they_were_written(exported):
  _, _, factors, folder = exported
  found = open_at(str(folder))
  assert (found.base.step, found.base.digest) == (7, "0" * 64)
  for shape in ((1, 1, 1), (2, 2, 2)):
    with jax.set_mesh(mesh_of(*shape)):
      loaded, step = found.load()
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, loaded, factors)
  assert sorted(path.name for path in folder.iterdir()) == [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "digests.json",
    "export.json",
    *["token_rows.safetensors"] * bool(found.config.tokens),
    "training_data.json",
  ]


@pytest.mark.parametrize("exported", ["opt-rows", "modern-rows"], indirect=True)
def test_peft_reads_the_sums_of_rows(exported):
  """PEFT replaces the rows of the base."""
  settings, base, factors, folder = exported
  places = {"embed": "model.embed_tokens", "head": "lm_head"}
  if settings.model.family == "opt":
    places = {"embed": "model.decoder.embed_tokens"}
  tensors = safetensors.load_file(str(folder / adapter_tensors.FILE))
  ids = [*range(300, 310), 5, 6]
  for name, module in places.items():
    found = tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(found, base[name][ids] + factors[name])
  indices = read_json(folder / "adapter_config.json")["trainable_token_indices"]
  assert indices == {module.rpartition(".")[2]: ids for module in places.values()}


@pytest.mark.parametrize("exported", ["opt-all"], indirect=True)
def test_damaged_adapters_are_refused(exported):
  folder = exported[-1]
  path, found = folder / adapter_tensors.FILE, open_at(folder)
  tensors = safetensors.load_file(str(path))
  first = next(iter(tensors))
  with one_device():
    for changed in (
      {name: x for name, x in tensors.items() if name != first},
      {**tensors, first: tensors[first][:1]},
      {**tensors, first: np.nan * tensors[first]},
    ):
      safetensors.save_file(changed, str(path))
      with refused(UserError):
        found.load()
    path.write_bytes(path.read_bytes()[:-3])
    with refused(UserError):
      found.load()
    path.unlink()
    with refused(UserError):
      found.load()


@pytest.mark.parametrize("exported", ["opt-all"], indirect=True)
def test_a_changed_file_is_named(exported):
  path = exported[-1] / adapter_tensors.FILE
  content = bytearray(path.read_bytes())
  content[-9] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=f"{path.name} has changed since the export was written"):
    open_at(exported[-1])
  (exported[-1] / "digests.json").unlink()  # As in an earlier version.
  assert open_at(exported[-1]).base.step == 7


@pytest.mark.parametrize("exported", ["modern-rows"], indirect=True)
def test_damaged_rows_are_refused(exported):
  folder = exported[-1]
  path, found = folder / adapter_tensors.ROWS, open_at(folder)
  rows = safetensors.load_file(str(path))
  assert {name: x.shape for name, x in rows.items()} == dict.fromkeys(("embed", "head"), (12, 32))
  with one_device():
    for changed in ({"embed": rows["embed"]}, {**rows, "head": rows["head"][:3]}):
      safetensors.save_file(changed, str(path))
      with refused(UserError):
        found.load()
    path.unlink()
    with refused(UserError):
      found.load()


@pytest.mark.parametrize("exported", ["opt-all"], indirect=True)
def test_a_run_without_adapters_is_refused(exported, tmp_path):
  settings = exported[0]
  write_json(tmp_path / "full" / "train" / "config.json", {"run": {}})
  with refused(UserError):
    peft_adapter.adapters_of(Run(epath.Path(tmp_path / "full"), settings))


# peft 0.21 reads an attribute that transformers 5.24 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.slow
def test_peft_gives_the_logits_of_the_sum(exported, tmp_path):
  """`peft` adds the adapters to the exported base."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from transformers import AutoModelForCausalLM

  settings, base, factors, folder = exported
  model, adapter = settings.model, settings.adapter
  huggingface.export(tmp_path / "base", base, model, settings.vocab, None)
  plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")).eval()
  ids = np.random.default_rng(0).integers(5, model.vocab_size, (8, 16)).astype(np.int32)
  with torch.no_grad():
    before = plain(torch.as_tensor(ids).long()).logits.numpy()
    tuned = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    found = tuned(torch.as_tensor(ids).long()).logits.numpy()
  positions = np.tile(np.arange(16, dtype=np.int32), (8, 1))
  with one_device():
    merged = adapters.merge(*jax.device_put((base, factors)), adapter)
    expected = np.asarray(model_logits(model, merged, ids, positions, np.ones_like(ids)))
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
  assert np.abs(found - before).max() > 0.1
  if adapter.tokens:  # Negative control: without the rows, other tokens' logits are the same.
    matrices = {name: x for name, x in factors.items() if isinstance(x, dict)}
    with one_device():
      merged = adapters.merge(*jax.device_put((base, matrices)), adapter)
      without = np.asarray(model_logits(model, merged, ids, positions, np.ones_like(ids)))
    assert np.abs(found - without).max() > 0.1
  described = read_json(folder / "adapter_config.json")
  assert set(described["target_modules"]) == set(tuned.peft_config["default"].target_modules)
