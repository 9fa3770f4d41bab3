"""Compares an export in the format peft with `peft` itself."""

import dataclasses

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.export import formats, huggingface
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.models import adapters
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import table
from cm3leon_jax.weights import stored
from tests.generation.run import SETTINGS, one_device
from tests.models.adapters_test import random_factors
from tests.models.tiny import model_logits, random_params

CHOICES = {
  "opt-all": ("opt", AdapterConfig(rank=3, alpha=6.0)),
  "modern-all": ("modern", AdapterConfig(rank=3, alpha=6.0)),
  "grouped-all": ("modern", AdapterConfig(rank=3)),
  "modern-two": ("modern", AdapterConfig(rank=2, alpha=8.0, targets=("v", "down"))),
}


@pytest.fixture(params=CHOICES, ids=str)
def exported(request, tmp_path):
  """Returns (settings, base, adapters, folder of the export)."""
  family, adapter = CHOICES[request.param]
  model = dataclasses.replace(SETTINGS.model, family=family, num_layers=2)
  model = dataclasses.replace(model, num_kv_heads=int(request.param == "grouped-all"))
  settings = dataclasses.replace(SETTINGS, model=model, adapter=adapter)
  run, folder = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "peft")
  begun = {"source": str(tmp_path / "base"), "step": 7, "digest": "0" * 64}
  identity = {**table.identity(settings, "train"), "init_from": begun}
  write_json(
    run / "train" / "config.json", {"run": identity, "settings": dataclasses.asdict(settings)}
  )
  with one_device():
    base, factors = random_params(model), random_factors(model, adapter)
  base, factors = jax.device_get((base, factors))
  choice = formats.Choice(format="peft")
  of_run = formats.TrainedRun(Run(run, settings), stored.of_tree(factors, 3), choice)
  numbers = formats.write(folder, of_run)
  assert numbers["parameters"] == adapters.count(model, adapter)
  return settings, base, factors, folder


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
  described = read_json(folder / "adapter_config.json")
  assert set(described["target_modules"]) == set(tuned.peft_config["default"].target_modules)
