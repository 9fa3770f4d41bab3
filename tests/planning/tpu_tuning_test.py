import pytest

from tests.planning.compiled import aot_compile

pytestmark = [pytest.mark.slow, pytest.mark.tpu_backend]
pytest.importorskip("libtpu")


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
  """Includes loss sums of all tasks. `most`: GiB of arguments and temporaries per device."""
  flags = [f"--config=ml_configs/sft_{size}.py", f"--config.model.remat_policy={policy}"]
  flags += [f"--topology={topology}", f"--config.train.rows_per_device={rows}"]
  flags += [f"--config.mesh.fsdp={mesh[0]}", f"--config.mesh.fsdp_inner={mesh[1]}"]
  report = aot_compile(tmp_path, *flags)["train"]
  assert report["tokens"] == 2**21
  assert report["sum_gib"] <= most
