import dataclasses

from cm3leon_jax.config import UserError
from cm3leon_jax.configs import cm3leon_7b
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.planning import search as search_lib
from cm3leon_jax.planning.search import Candidate, kept_bytes, meshes, search
from cm3leon_jax.planning.topology import CHIPS, Topology
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.training.config import on_mesh
from tests.refusals import refused

POD = Topology("v5e:16x16", CHIPS["v5e"], (16, 16), 1, tuple(range(256)))
SETTINGS = settings_from_config(cm3leon_7b.get_config())


def test_mesh_axes_follow_the_torus():
  assert next(meshes(POD)) == MeshConfig(1, 16, 1, 16)
  assert MeshConfig(1, 16, 4, 4) in list(meshes(POD))
  cube = dataclasses.replace(POD, name="v5p:4x4x8", torus=(4, 4, 8), slices=2)
  assert next(meshes(cube)) == MeshConfig(2, 16, 1, 8)


def test_a_candidate_keeps_the_global_batch():
  candidate = Candidate(MeshConfig(1, 16, 1, 16), 4, "full")
  changed = candidate.apply(SETTINGS, POD)
  assert changed.train.global_batch_size == 8_192
  assert on_mesh(changed.train, 256).gradient_accumulation_steps == 8
  assert candidate.flags == (
    "--config.mesh.data=1 --config.mesh.fsdp=16 --config.mesh.tensor=1 --config.mesh.fsdp_inner=16 "
    "--config.train.rows_per_device=4 --config.model.remat_policy=full"
  )
  with refused(UserError):
    Candidate(MeshConfig(1, 16, 1, 16), 3, "full").apply(SETTINGS, POD)


def test_bytes_that_a_policy_keeps():
  """With 4 x 4,096 tokens, 7B keeps 4 GiB of layer inputs, and 4 GiB per saved array [B, L, D]."""
  expected = {"full": 4, "offload": 4, "save_attention": 12, "save_qkv": 20, "minimal": 36}
  for policy, gib in expected.items():
    assert kept_bytes(ModelConfig(), 4 * 4_096, policy) == gib * 2**30


def test_search_sorts_candidates_that_fit_by_cost(monkeypatch):
  """Fakes costs: `full` takes 2 us per token; other policies take 1 us and fit at most 2 rows."""
  monkeypatch.setattr(search_lib, "create_mesh", lambda config, devices: config)
  tried = []

  def compile_one(settings, mesh):
    policy = settings.model.remat_policy
    rows = settings.train.rows_per_device
    tried.append((policy, rows))
    if mesh.tensor > 1 or (policy != "full" and rows > 2):
      raise UserError("too large.")
    tokens = settings.train.global_batch_size * settings.data.sequence_length
    seconds = (2e-6 if policy == "full" else 1e-6) * tokens / 256
    numbers = {"tokens": tokens, "devices": 256, "cycles": tokens / rows, "sum_gib": 1.0}
    return {**numbers, "compute_seconds": seconds, "collective_seconds": 0.0}

  lines = []
  found = search(SETTINGS, POD, compile_one, lines.append)
  assert [(r["candidate"]["policy"], r["candidate"]["batch"]) for r in found[:2]] == [
    ("save_qkv", 2),
    ("minimal", 1),
  ]
  assert found[-1]["candidate"]["policy"] == "full"
  # Skipped, because the kept values alone exceed the chip's memory.
  assert ("minimal", 16) not in tried
  assert any("too large." in line for line in lines)
