"""Real compilations by XLA:TPU, without a TPU: in processes of their own, for libtpu is loaded once and for all."""

import json
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu_backend
pytest.importorskip("libtpu")


def aot_compile(tmp_path, *flags) -> dict:
  """Reports of launch.aot_compile with these flags."""
  command = [
    sys.executable,
    "-m",
    "launch.aot_compile",
    f"--json={tmp_path / 'report.json'}",
    *flags,
  ]
  result = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert result.returncode == 0, result.stderr[-2000:]
  return json.loads((tmp_path / "report.json").read_text())


SMALL = (
  "--config=ml_configs/cm3leon_350m.py",
  "--config.model.num_layers=2",
  "--config.data.sequence_length=1024",
)


def test_a_small_step_for_a_pod_reduce_scatters_gradients_and_holds_no_more_than_a_chunk_of_logits(
  tmp_path,
):
  """v5e:4x4, an fsdp axis along each dimension of the torus."""
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4", "--batch_per_device=2")
  report = aot_compile(tmp_path, *SMALL, "--topology=v5e-16", *mesh)["train"]
  found = report["collectives"]
  layers, table = 2 * 12 * 1_024**2 * 2, 64_512 * 1_024 * 2  # Bytes of their gradients in bfloat16.
  assert found["reduce-scatter"]["bytes"] > layers + table
  assert found["all-reduce"]["bytes"] < 0.05 * found["reduce-scatter"]["bytes"], (
    "nothing large is all-reduced"
  )
  assert 1 < report["flops"] * report["devices"] / report["model_flops"] < 1.4
  assert report["sum_gib"] < report["hbm_gib"]
  tables = ("[64512,1024]", "[1024,64512]")
  logits = [
    x for x in report["largest"] if "64512" in x["array"] and not x["array"].endswith(tables)
  ]
  assert all(x["bytes"] <= 2 * 256 * 64_512 * 4 for x in logits), "256 tokens of 2 rows in fp32"


def test_an_evaluation_takes_a_micro_batch_and_less_memory_than_the_train_step(tmp_path):
  flags = ["--config.mesh.fsdp=4", "--config.mesh.fsdp_inner=4", "--topology=v5e-16"]
  flags += ["--config.train.global_batch_size=128", "--config.train.gradient_accumulation_steps=4"]
  train, evaluation = (
    aot_compile(tmp_path, *SMALL, *flags, f"--program={program}")[program]
    for program in ("train", "evaluate")
  )
  assert train["tokens"] == 4 * evaluation["tokens"] == 128 * 1_024
  assert evaluation["temporaries_gib"] < train["temporaries_gib"]
  resident = evaluation["sum_gib"] + evaluation["optimizer_gib"]
  assert resident < train["sum_gib"]
  assert evaluation["flops"] * evaluation["devices"] / evaluation["model_flops"] == pytest.approx(
    1, rel=0.05
  )


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
  """Arguments and temporaries of a device, GiB; docs/scaling.md has the numbers seen."""
  flags = [
    "--config=ml_configs/cm3leon_7b.py",
    f"--topology={topology}",
    f"--batch_per_device={batch}",
  ]
  flags += [
    f"--config.mesh.fsdp={mesh[0]}",
    f"--config.mesh.fsdp_inner={mesh[1]}",
    f"--config.model.remat_policy={policy}",
  ]
  report = aot_compile(tmp_path, *flags)["train"]
  assert report["sum_gib"] <= most
  collectives = report["collectives"]
  assert collectives["all-reduce"]["bytes"] < 0.05 * collectives["reduce-scatter"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["350m", "760m"])
@pytest.mark.parametrize("family", ["opt", "modern"])
def test_heads_of_64_and_96_and_the_other_family_compile(tmp_path, size, family):
  flags = [
    "--config.mesh.fsdp=4",
    "--config.mesh.fsdp_inner=4",
    "--batch_per_device=4",
    f"--config.model.family={family}",
  ]
  report = aot_compile(
    tmp_path, f"--config=ml_configs/cm3leon_{size}.py", "--topology=v5e-16", *flags
  )["train"]
  assert report["sum_gib"] < report["hbm_gib"]


def test_what_does_not_fit_is_told_in_one_sentence(tmp_path):
  flags = [
    "--topology=v5e-4",
    "--batch_per_device=16",
    "--config.model.remat_policy=none",
    "--config.mesh.fsdp=4",
  ]
  command = [
    sys.executable,
    "-m",
    "launch.aot_compile",
    *SMALL,
    "--config.model.num_layers=40",
    *flags,
  ]
  result = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert result.returncode == 2
  assert re.search(
    r"error: v5e:2x2: the program does not fit: temporaries of [\d.]+ GiB, 15.75 are there\.",
    result.stderr,
  )
  assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "tensor"), [("v5e-8", 8), ("v5p-8", 4)])
def test_the_7b_decoder_fits_and_copies_no_cache(tmp_path, topology, tensor):
  """64 prompts of two streams, 1,152 positions; what a step moves is near the weights and the cache, read once."""
  flags = [
    "--config=ml_configs/cm3leon_7b.py",
    f"--topology={topology}",
    f"--config.mesh.tensor={tensor}",
    "--program=decode",
  ]
  reports = aot_compile(tmp_path, *flags)
  step, prefill = reports["decode"], reports["prefill"]
  assert step["sum_gib"] < step["hbm_gib"]
  assert prefill["peak_gib"] < prefill["hbm_gib"]
  assert step["temporaries_gib"] < 0.1 * step["floor_bytes"] / 2**30
  assert 1 < step["traffic"] / step["floor_bytes"] < 1.2
  heads = 32 // tensor
  assert not [
    x
    for x in step["largest"]
    if x["array"] == f"bf16[64,{heads},1152,128]" and x["source"] == "copy"
  ]
