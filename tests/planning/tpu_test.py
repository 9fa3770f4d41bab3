"""Compiles programs for TPU without a TPU: train step, evaluation and decoder."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.tpu_backend]
pytest.importorskip("libtpu")

SMALL = (
  "--config=ml_configs/cm3leon_350m.py",
  "--config.model.num_layers=2",
  "--config.data.sequence_length=1024",
)


def run_command(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "launch.aot_compile", *flags]
  # Memory use must be that of optimized programs.
  environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  return subprocess.run(
    command, capture_output=True, text=True, timeout=900, env=environment, check=False
  )


def aot_compile(folder: pathlib.Path, *flags: str) -> dict:
  """Runs the command with these flags and returns its reports: program name -> report."""
  result = run_command(f"--json={folder / 'report.json'}", *flags)
  assert result.returncode == 0, result.stderr[-2000:]
  return json.loads((folder / "report.json").read_text())


def test_a_train_step_reduce_scatters_gradients_and_holds_only_chunks_of_logits(tmp_path):
  """Compiles for v5e:4x4, with one fsdp axis along each dimension of the torus."""
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4", "--batch_per_device=2")
  report = aot_compile(tmp_path, *SMALL, "--topology=v5e-16", *mesh)["train"]
  collectives = report["collectives"]
  # Bytes of the gradients of layers and of table in bfloat16.
  layers, table = 2 * 12 * 1_024**2 * 2, 64_512 * 1_024 * 2
  assert collectives["reduce-scatter"]["bytes"] > layers + table
  assert collectives["all-reduce"]["bytes"] < 0.05 * collectives["reduce-scatter"]["bytes"]
  assert 1 < report["flops"] * report["devices"] / report["model_flops"] < 1.4
  assert report["sum_gib"] < report["hbm_gib"]
  tables = ("[64512,1024]", "[1024,64512]")
  logits = [x for x in report["largest"] if "64512" in x["array"]]
  logits = [x for x in logits if not x["array"].endswith(tables)]
  # At most 2 rows x 256 tokens in fp32.
  assert all(x["bytes"] <= 2 * 256 * 64_512 * 4 for x in logits)


def test_an_evaluation_takes_a_micro_batch_and_less_memory_than_the_train_step(tmp_path):
  flags = ["--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4", "--topology=v5e-16"]
  flags += ["--config.train.global_batch_size=128", "--config.train.rows_per_device=2"]
  train, evaluation = (
    aot_compile(tmp_path, *SMALL, *flags, f"--program={program}")[program]
    for program in ("train", "evaluate")
  )
  assert train["tokens"] == 4 * evaluation["tokens"] == 128 * 1_024
  assert evaluation["temporaries_gib"] < train["temporaries_gib"]
  resident = evaluation["sum_gib"] + evaluation["rest_gib"]
  assert resident < train["sum_gib"]
  flops = evaluation["flops"] * evaluation["devices"]
  assert flops / evaluation["model_flops"] == pytest.approx(1, rel=0.05)


def test_the_modern_family_compiles_with_heads_of_96(tmp_path):
  flags = ["--config=ml_configs/cm3leon_760m.py", "--config.model.family=modern"]
  flags += ["--topology=v5e-16", "--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4"]
  report = aot_compile(tmp_path, *flags, "--batch_per_device=4")["train"]
  assert report["sum_gib"] < report["hbm_gib"]


def test_a_program_that_does_not_fit_is_reported_in_one_sentence():
  flags = ["--topology=v5e-4", "--batch_per_device=16", "--config.mesh.fsdp=4"]
  flags += ["--config.model.num_layers=40", "--config.model.remat_policy=none"]
  result = run_command(*SMALL, *flags)
  assert result.returncode == 2
  assert "error: v5e:2x2: the program does not fit: " in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("variant", "heads"), [("", 4), (":gqa", 1)])
def test_the_7b_decoder_fits_and_copies_no_cache(variant, heads, tmp_path):
  """With 64 prompts, 2 streams and 1,152 positions, a step reads little but weights and cache."""
  flags = ["--topology=v5e-8", "--config.mesh.tensor=8", "--program=decode"]
  reports = aot_compile(tmp_path, f"--config=ml_configs/cm3leon_7b.py{variant}", *flags)
  step, prefill = reports["decode"], reports["prefill"]
  assert step["sum_gib"] < step["hbm_gib"]
  assert prefill["peak_gib"] < prefill["hbm_gib"]
  assert step["temporaries_gib"] < 0.1 * step["floor_bytes"] / 2**30
  assert 1 < step["traffic"] / step["floor_bytes"] < 1.2
  cache = f"bf16[64,{heads},1152,128]"
  assert not [x for x in step["largest"] if x["array"] == cache and x["source"] == "copy"]
