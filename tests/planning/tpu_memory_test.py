import pytest

from tests.planning.compiled import aot_compile

pytestmark = [pytest.mark.slow, pytest.mark.tpu_backend]
pytest.importorskip("libtpu")


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
  """`most`: GiB of arguments and temporaries per device; docs/scaling.md has the exact numbers."""
  flags = ["--config=ml_configs/cm3leon_7b.py", f"--config.model.remat_policy={policy}"]
  flags += [f"--topology={topology}", f"--batch_per_device={batch}"]
  flags += [f"--config.mesh.fsdp={mesh[0]}", f"--config.mesh.fsdp_inner={mesh[1]}"]
  report = aot_compile(tmp_path, *flags)["train"]
  assert report["sum_gib"] <= most
  collectives = report["collectives"]
  assert collectives["all-reduce"]["bytes"] < 0.05 * collectives["reduce-scatter"]["bytes"]


def test_memory_of_learning_from_rewards(tmp_path):
  """Draws one image per device of v5p-256 with the 7B model, and trains on all of the images."""
  flags = ["--config=ml_configs/sft_7b.py", "--topology=v5p-256", "--config.mesh.fsdp=16"]
  flags += ["--config.mesh.fsdp_inner=8", "--batch_per_device=1", "--decode_batch=128"]
  update = aot_compile(tmp_path, *flags, "--program=reinforce")["reinforce"]
  assert update["tokens"] == 128 * 1_536
  assert update["sum_gib"] <= 4.0
  assert aot_compile(tmp_path, *flags, "--program=decode")["decode"]["sum_gib"] <= 95.73
