import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.importing import importer
from cm3leon_jax.importing.source import open_source
from cm3leon_jax.stages import stages
from tests.importing.importer_test import QWEN3, imported, settings_for
from tests.refusals import refused

ZEROS = np.zeros(32, np.float32)
Q = "layers.0.self_attn.q_proj"


def altered(folder, target, config=(), tensors=()) -> pathlib.Path:
  """Copies a checkpoint with changed fields and tensors; a tensor of None is removed."""
  shutil.copytree(folder, target)
  described = read_json(target / "config.json") | dict(config)
  write_json(target / "config.json", described)
  weights = safetensors.load_file(target / "model.safetensors") | dict(tensors)
  kept = {name: np.asarray(x) for name, x in weights.items() if x is not None}
  safetensors.save_file(kept, target / "model.safetensors")
  return target


def refuses(source) -> None:
  with refused(UserError, str(source)):
    importer.plan(settings_for(QWEN3), str(source))


def a_bias(value: float, place: int = 3) -> np.ndarray:
  x = ZEROS.copy()
  x[place] = value
  return x


@pytest.mark.parametrize(
  ("config", "tensors"),
  [
    ({"hidden_act": "gelu"}, {}),
    ({"rms_norm_eps": 1e-5}, {}),
    ({"use_sliding_window": True}, {}),
    ({"layer_types": ["sliding_attention"] * 2}, {}),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, {}),
    ({"layer_types": 3}, {}),
    ({"rope_parameters": "x"}, {}),
    ({"rope_parameters": {"rope_theta": "x"}}, {}),
    ({"rope_parameters": {"rope_theta": 0}}, {}),
    ({"rope_parameters": {"rope_theta": 10**400}}, {}),
    ({"num_key_value_heads": 3}, {}),
    ({"num_attention_heads": 4.5}, {}),
    ({"attention_bias": True}, {f"model.{Q}.bias": a_bias(0.1)}),
    ({}, {"model.layers.0.mlp.experts.weight": ZEROS}),
    ({}, {"lm_head.weight": np.ones((480, 32), np.float32)}),
    ({}, {"model.norm.weight": None}),
    ({}, {"model.norm.weight": np.ones(31, np.float32)}),
    ({"model_type": "llama"}, {}),
    ({"model_type": "opt"}, {}),
    ({"model_type": None}, {}),
    ({"cm3leon": {"num_special": 8, "text_size": 9}, "rope_theta": 1e6}, {}),
    ({"cm3leon": 3, "rope_theta": 1e6}, {}),
  ],
)
def test_a_qwen3_that_is_not_ours_is_refused(config, tensors, qwen3_folder, tmp_path):
  refuses(altered(qwen3_folder, tmp_path / "source", config, tensors))


def test_a_base_of_rope_outside_of_rope_parameters_is_read(qwen3_folder, tmp_path):
  """Earlier versions of transformers wrote `rope_theta` at the top level of config.json."""
  fields = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1_000_000}
  source = altered(qwen3_folder, tmp_path / "source", fields)
  assert importer.plan(settings_for(QWEN3), str(source)).fields["model"]["rope_base"] == 1e6
  refuses(altered(qwen3_folder, tmp_path / "other", fields | {"rope_theta": None}))


@pytest.mark.parametrize("x", [np.full((32, 64), np.nan, np.float32), np.ones((32, 64), np.int8)])
def test_values_that_are_no_numbers_are_refused_and_leave_no_weights(x, qwen3_folder, tmp_path):
  name = "model.layers.1.mlp.down_proj.weight"
  source = altered(qwen3_folder, tmp_path / "source", tensors={name: x})
  with refused(UserError, str(source), name):
    imported(source, tmp_path / "run", settings_for(QWEN3))
  assert not (tmp_path / "run" / "init" / "model.safetensors").exists()
  assert not (tmp_path / "run" / "init" / stages.DONE).exists()


@pytest.mark.parametrize("name", ["absent", "../other", "damaged", "empty"])
def test_an_index_that_names_other_files_is_refused(name, qwen3_folder, tmp_path):
  source = altered(qwen3_folder, tmp_path / "source")
  (source / "model.safetensors").unlink()
  (source / "damaged.safetensors").write_bytes(b"\xff" * 20)
  safetensors.save_file({"x": ZEROS}, source / "empty.safetensors")
  index = {"metadata": {}, "weight_map": {"model.norm.weight": f"{name}.safetensors"}}
  (source / "model.safetensors.index.json").write_text(json.dumps(index))
  with refused(UserError, str(source)):
    open_source(str(source))


def make_huge(path) -> None:
  path.touch()
  os.truncate(path, 2**40)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_huge])
def test_what_is_no_regular_file_or_is_huge_is_refused(name, make, qwen3_folder, tmp_path):
  """Opening a named pipe would block forever."""
  source = altered(qwen3_folder, tmp_path / "source")
  (source / name).unlink()
  make(source / name)
  refuses(source)
