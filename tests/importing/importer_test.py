import dataclasses

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import logsumexp

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.export import huggingface
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.importing import importer
from cm3leon_jax.importing.qwen3 import extend
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import load_initial
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import placed
from cm3leon_jax.weights.stored_tensors import StoredTensors
from tests.generation.run import make_config
from tests.importing import published
from tests.models.tiny import mesh_of, random_params

TOLERANCE = 1e-4  # Tolerance in nats per token; in fp32, losses are about 7.
SAMPLES = np.random.default_rng(0).integers(0, published.TOKENS, (2, 24)).astype(np.int32)
QWEN3 = {"family": "modern", "num_layers": 2, "num_heads": 4, "mlp_width": 64, "head_size": 12}
QWEN3 |= {"num_kv_heads": 2, "rope_base": 1e6}


def settings_for(fields, rows=published.ROWS, num_special=32, image_size=64):
  config = make_config()
  config.vocab.update({"num_special": num_special, "text_size": num_special + rows})
  config.vocab.image_size = image_size
  config.model.update({"vocab_size": num_special + rows + image_size, **fields})
  return settings_from_config(config)


def imported(source, workdir, settings):
  return importer.write(settings, workdir, importer.plan(settings, str(source)))


def losses_of(params, settings) -> np.ndarray:
  """Computes the losses of SAMPLES in nats, normalized over the source's text ids only."""
  vocab, losses = settings.vocab, []
  model = dataclasses.replace(settings.model, attention="plain")
  for sample in SAMPLES:
    tokens, positions = sample + vocab.num_special, np.arange(len(sample), dtype=np.int32)
    logits = huggingface.causal_logits(model, params, tokens, positions)
    text = np.asarray(logits)[:-1, vocab.num_special : vocab.text_size].astype(np.float64)
    losses.append(logsumexp(text, axis=-1) - text[np.arange(len(text)), sample[1:]])
  return np.stack(losses)


def losses_of_original(model) -> np.ndarray:
  import torch

  ids = torch.from_numpy(SAMPLES).long()
  with torch.no_grad():
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").numpy()
  assert losses.std() > 1
  return losses


def losses_of_import(workdir, settings, change=None) -> np.ndarray:
  """Returns the losses of the parameters in init/, read on eight devices, as in training."""
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params = load_initial(initial.find(settings, str(workdir / "init")), settings)
    return losses_of(params if change is None else change(params), settings)


def difference(a, b) -> float:
  return float(np.abs(a - b).max())


@pytest.mark.parametrize(
  ("tied", "dtype", "shards"),
  [(True, "bfloat16", "40KB"), (False, "float32", "50GB"), (False, "float16", "40KB")],
)
def test_a_qwen3_has_the_loss_of_the_original(tied, dtype, shards, tmp_path):
  source, workdir = tmp_path / "source", epath.Path(tmp_path) / "run"
  model = published.save_qwen3(source, dtype, shards, tie_word_embeddings=tied)
  assert (source / "model.safetensors").exists() == (shards == "50GB")
  settings = settings_for(QWEN3)
  lines = imported(source, workdir, settings)
  expected = losses_of_original(model)
  assert difference(losses_of_import(workdir, settings), expected) < TOLERANCE
  said = " ".join(lines)
  assert "</s> starts as the source's id 467, the others start as the mean" in said


def test_other_rotations_and_orders_of_heads_have_another_loss(tmp_path):
  source = tmp_path / "source"
  expected = losses_of_original(published.save_qwen3(source))
  settings = settings_for(QWEN3)
  imported(source, tmp_path / "right", settings)
  wrong = dataclasses.replace(settings.model, rope_base=0.0)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = placed.load(StoredTensors(tmp_path / "right" / "init"), settings.model)
    other = losses_of(params, dataclasses.replace(settings, model=wrong))
  assert difference(other, expected) > 1_000 * TOLERANCE

  def exchanged(params):
    blocks = params["blocks"]
    return params | {"blocks": blocks | {"kv": jnp.flip(blocks["kv"], axis=-2)}}

  other = losses_of_import(tmp_path / "right", settings, change=exchanged)
  assert difference(other, expected) > 1_000 * TOLERANCE


def test_an_import_has_the_tensors_of_the_original_and_is_exported_as_they_are(tmp_path):
  """Only token tables differ, which have more rows. The cache has as many heads as keys."""
  published.save_qwen3(tmp_path / "source")
  settings = settings_for(QWEN3)
  imported(tmp_path / "source", tmp_path / "run", settings)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = placed.load(StoredTensors(tmp_path / "run" / "init"), settings.model)
    huggingface.export(tmp_path / "export", params, settings.model, settings.vocab, None)
    assert cache_lib.empty(settings.model, 1, 8)[0].keys.shape == (1, 2, 8, 12)
  theirs, ours = (
    load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "export")
  )
  layers = [name for name in theirs if ".layers." in name]
  assert len(layers) == 2 * 11
  for name in layers:
    np.testing.assert_array_equal(ours[name], theirs[name])
  assert read_json(tmp_path / "export" / "config.json")["num_key_value_heads"] == 2


def test_new_rows_are_the_mean_and_the_end_of_text():
  vocab = VocabLayout(num_special=6, text_size=265, image_size=2)
  table = np.random.default_rng(0).normal(size=(259, 3)).astype(np.float32)
  a, mean = table[:1], table.mean(0, dtype=np.float64).astype(np.float32)[None]
  result = extend(table, vocab, end=0)
  np.testing.assert_array_equal(result, np.concatenate([mean, a, *[mean] * 4, table, mean, mean]))
  np.testing.assert_array_equal(extend(table, vocab, end=None)[vocab.eos], mean[0])


@pytest.mark.parametrize(("family", "head_size"), [("opt", 0), ("modern", 0), ("modern", 12)])
def test_an_export_of_this_project_is_imported_bit_for_bit(family, head_size, tmp_path):
  settings = settings_for({"family": family, "head_size": head_size})
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(settings.model, seed=5)
    huggingface.export(tmp_path / "export", params, settings.model, settings.vocab, None)
    expected = jax.device_get(params)
  learned = {"runs": [{"name": "before", "known": False}], "origins": []}
  write_json(tmp_path / "export" / training_data.FILE, learned)
  images = tmp_path / "export" / "image_tokenizer" / "params.safetensors"
  images.parent.mkdir()
  images.write_bytes(b"a")
  lines = imported(tmp_path / "export", tmp_path / "run", settings)
  assert any("do not change" in line for line in lines)
  assert any(f"cm3leon import_vqgan --source={images.parent}` instead" in line for line in lines)
  init, ours = str(tmp_path / "run" / "init"), tmp_path / "run" / "vqgan" / "params.safetensors"
  ours.parent.mkdir()
  for written, others in ((b"a", []), (b"b", ["image tokenizer"])):
    ours.write_bytes(written)
    assert initial.other_tokenizers(init, tmp_path / "run") == others
  assert training_data.collect(tmp_path / "run" / "init") == learned
  with jax.set_mesh(mesh_of(2, 2, 2)):
    found = initial.find(settings, str(tmp_path / "run" / "init"))
    params, split = load_initial(found, settings), random_params(settings.model)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(split), strict=True):
    assert x.sharding == y.sharding
