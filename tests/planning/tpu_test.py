"""Compiles for TPU without a TPU, in separate processes: a process cannot unload libtpu."""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu_backend
pytest.importorskip("libtpu")


def run_command(*flags):
  command = [sys.executable, "-m", "launch.aot_compile", *flags]
  # The plans are of optimized programs.
  environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def aot_compile(tmp_path, *flags) -> dict:
  """Runs launch.aot_compile with these flags and returns its reports."""
  result = run_command(f"--json={tmp_path / 'report.json'}", *flags)
  assert result.returncode == 0, result.stderr[-2000:]
  return json.loads((tmp_path / "report.json").read_text())


SMALL = (
  "--config=ml_configs/cm3leon_350m.py",
  "--config.model.num_layers=2",
  "--config.data.sequence_length=1024",
)


def test_a_train_step_reduce_scatters_gradients_and_holds_only_chunks_of_logits(tmp_path):
  """On v5e:4x4, with an fsdp axis along each dimension of the torus."""
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4", "--batch_per_device=2")
  report = aot_compile(tmp_path, *SMALL, "--topology=v5e-16", *mesh)["train"]
  collectives = report["collectives"]
  layers, table = 2 * 12 * 1_024**2 * 2, 64_512 * 1_024 * 2  # Bytes of their gradients in bfloat16.
  assert collectives["reduce-scatter"]["bytes"] > layers + table
  assert collectives["all-reduce"]["bytes"] < 0.05 * collectives["reduce-scatter"]["bytes"]
  assert 1 < report["flops"] * report["devices"] / report["model_flops"] < 1.4
  assert report["sum_gib"] < report["hbm_gib"]
  tables = ("[64512,1024]", "[1024,64512]")
  logits = [x for x in report["largest"] if "64512" in x["array"]]
  logits = [x for x in logits if not x["array"].endswith(tables)]
  assert all(x["bytes"] <= 2 * 256 * 64_512 * 4 for x in logits)  # 256 tokens of 2 rows in fp32.


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "mesh", "batch", "policy", "most"),
  [
    ("v5p-256", (16, 8), 4, "full", 8.0),
    ("v5e-256", (16, 16), 2, "full", 4.5),
    ("v6e-256", (16, 16), 4, "full", 7.8),
    ("v5p-8", (4, 1), 4, "full", 33),
    ("v5p-8", (4, 1), 4, "minimal", 66),
    ("v5e-256", (16, 16), 4, "save_attention", 15.75),
  ],
)
def test_memory_of_the_7b_step(tmp_path, topology, mesh, batch, policy, most):
  """Bounds arguments and temporaries of a device in GiB; docs/scaling.md has measured numbers."""
  flags = ["--config=ml_configs/cm3leon_7b.py", f"--config.model.remat_policy={policy}"]
  flags += [f"--topology={topology}", f"--batch_per_device={batch}"]
  flags += [f"--config.mesh.fsdp={mesh[0]}", f"--config.mesh.fsdp_inner={mesh[1]}"]
  report = aot_compile(tmp_path, *flags)["train"]
  assert report["sum_gib"] <= most
  collectives = report["collectives"]
  assert collectives["all-reduce"]["bytes"] < 0.05 * collectives["reduce-scatter"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("size", "topology", "mesh", "rows", "policy", "most"),
  [
    ("7b", "v5p-256", (16, 8), 4, "full", 8.0),
    ("7b", "v5e-256", (16, 16), 2, "full", 4.5),
    ("7b", "v6e-256", (16, 16), 2, "full", 4.5),
    ("7b", "v5p-8", (2, 2), 4, "full", 40),
    ("350m", "v5e-256", (16, 16), 2, "minimal", 15.75),
    ("350m", "v5p-8", (2, 2), 32, "minimal", 95.73),
    ("760m", "v5e-256", (16, 16), 2, "minimal", 15.75),
    ("760m", "v5p-8", (2, 2), 16, "minimal", 95.73),
  ],
)
def test_memory_of_a_step_of_tuning(tmp_path, size, topology, mesh, rows, policy, most):
  """With the sums of all tasks; bounds in GiB as above."""
  flags = [f"--config=ml_configs/sft_{size}.py", f"--config.model.remat_policy={policy}"]
  flags += [f"--topology={topology}", f"--config.train.rows_per_device={rows}"]
  flags += [f"--config.mesh.fsdp={mesh[0]}", f"--config.mesh.fsdp_inner={mesh[1]}"]
  report = aot_compile(tmp_path, *flags)["train"]
  assert report["tokens"] == 2**21
  assert report["sum_gib"] <= most


@pytest.mark.slow
def test_memory_of_learning_from_rewards(tmp_path):
  """The 7B draws an image for a prompt on every device of v5p-256, and learns from all of them."""
  flags = ["--config=ml_configs/sft_7b.py", "--topology=v5p-256", "--config.mesh.fsdp=16"]
  flags += ["--config.mesh.fsdp_inner=8", "--batch_per_device=1", "--decode_batch=128"]
  update = aot_compile(tmp_path, *flags, "--program=reinforce")["reinforce"]
  assert update["tokens"] == 2 * 128 * 1_151
  assert update["sum_gib"] <= 4.0
  assert aot_compile(tmp_path, *flags, "--program=decode")["decode"]["sum_gib"] <= 95.73


@pytest.mark.slow
@pytest.mark.parametrize("size", ["350m", "760m"])
@pytest.mark.parametrize("family", ["opt", "modern"])
def test_both_families_compile_with_heads_of_64_and_96(tmp_path, size, family):
  flags = [f"--config=ml_configs/cm3leon_{size}.py", f"--config.model.family={family}"]
  flags += ["--topology=v5e-16", "--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4"]
  report = aot_compile(tmp_path, *flags, "--batch_per_device=4")["train"]
  assert report["sum_gib"] < report["hbm_gib"]


def test_a_program_that_does_not_fit_is_reported_in_one_sentence():
  flags = ["--topology=v5e-4", "--batch_per_device=16", "--config.mesh.fsdp=4"]
  flags += ["--config.model.num_layers=40", "--config.model.remat_policy=none"]
  result = run_command(*SMALL, *flags)
  assert result.returncode == 2
  reason = r"temporaries need [\d.]+ GiB; the chip has 15.75 GiB\."
  assert re.search(f"error: v5e:2x2: the program does not fit: {reason}", result.stderr)
  assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "tensor"), [("v5e-8", 8), ("v5p-8", 4)])
def test_the_7b_decoder_fits_and_copies_no_cache(tmp_path, topology, tensor):
  """64 prompts of two streams, 1,152 positions: a step moves little more than weights and cache."""
  flags = [f"--topology={topology}", f"--config.mesh.tensor={tensor}", "--program=decode"]
  reports = aot_compile(tmp_path, "--config=ml_configs/cm3leon_7b.py", *flags)
  step, prefill = reports["decode"], reports["prefill"]
  assert step["sum_gib"] < step["hbm_gib"]
  assert prefill["peak_gib"] < prefill["hbm_gib"]
  assert step["temporaries_gib"] < 0.1 * step["floor_bytes"] / 2**30
  assert 1 < step["traffic"] / step["floor_bytes"] < 1.2
  cache = f"bf16[64,{32 // tensor},1152,128]"
  assert not [x for x in step["largest"] if x["array"] == cache and x["source"] == "copy"]
