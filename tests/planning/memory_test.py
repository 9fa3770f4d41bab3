"""Tests memory estimates against the compiler's numbers in docs/scaling.md, and error messages."""

import dataclasses
import importlib
import math
import pathlib
import re
import statistics
import types

from etils import epath
import jax
import pytest

from cm3leon_jax.commands import reinforce as reinforce_command
from cm3leon_jax.commands import train as train_command
from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.mesh import MeshConfig, abstract
from cm3leon_jax.models.config import AdapterConfig
from cm3leon_jax.planning import memory
from cm3leon_jax.planning.topology import CHIPS
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.training.steps import compile_steps
from tests.generation.run import SETTINGS
from tests.models.tiny import mesh_of
from tests.refusals import refused

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"
MESHES = {"v5e-256": (16, 16), "v6e-256": (16, 16), "v5p-256": (16, 8), "v5p-8": (2, 2)}
GIB = 2**30
# Rows of the tables: size, slice, rows per device x passes, remat, arguments + temporaries = sum.
ROW = re.compile(
  r"\| (\w+) \| (v\w+-\d+) \| (\d+)(?: x (\d+))? \| (\w+) \| [\d.]+ \+ [\d.]+ = \*\*([\d.]+)\*\*"
)
# Rows of the table "Which is the fastest" and of the evaluations: slice, mesh, rows, remat, GiB.
SEARCHED = [
  ("v5p-8", (1, 2, 1, 2), 4, "minimal", 70.00),
  ("v5p-256", (1, 16, 1, 8), 8, "minimal", 81.09),
  ("v5e-256", (1, 8, 2, 16), 2, "minimal", 11.57),
  ("v5e-256", (1, 16, 1, 16), 2, "save_qkv", 12.64),
  ("v6e-256", (1, 16, 1, 16), 2, "minimal", 20.16),
  ("v5e-256", (1, 16, 1, 16), 4, "full", 6.98),
  ("v5p-8", (1, 2, 1, 2), 4, "full", 38.09),
  ("2 x v5e-256", (2, 16, 1, 16), 4, "full", 8.54),
]


def settings_of(config: str, mesh: tuple, rows: int, policy: str, global_batch_size: int = 0):
  """Returns the settings of a shipped config with a mesh of (data, fsdp, tensor, fsdp_inner)."""
  module = importlib.import_module(f"cm3leon_jax.configs.{config}")
  values = module.get_config()
  values.mesh.update(dict(zip(("data", "fsdp", "tensor", "fsdp_inner"), mesh, strict=True)))
  values.model.remat_policy = policy
  values.train.rows_per_device = rows
  if global_batch_size:
    values.train.global_batch_size = global_batch_size
  return settings_from_config(values)


def estimated(settings) -> memory.Memory:
  devices = math.prod(settings.mesh.shape)
  return memory.estimate(settings, settings.mesh.over(devices))


def documented() -> list[tuple]:
  """Returns (name, settings, GiB per device by the compiler) of docs/scaling.md's train steps."""
  text = PAGE.read_text()
  tuning = text.index("### Instruction tuning")
  cases = []
  for row in ROW.finditer(text):
    size, topology, rows, passes, policy, gib = row.groups()
    fsdp, inner = MESHES[topology]
    config = "sft" if row.start() > tuning else "cm3leon"
    batch = int(rows) * fsdp * inner * int(passes or 1)
    settings = settings_of(f"{config}_{size}", (1, fsdp, 1, inner), int(rows), policy, batch)
    cases.append((row.group(), settings, float(gib)))
  for topology, mesh, rows, policy, gib in SEARCHED:
    cases.append((f"{topology} {policy}", settings_of("cm3leon_7b", mesh, rows, policy), gib))
  return cases


def test_the_estimate_is_near_the_compilers_numbers_of_every_documented_step():
  cases = documented()
  assert len(cases) == 28 + len(SEARCHED)
  errors = [(estimated(settings).total / GIB / gib - 1, name) for name, settings, gib in cases]
  sizes = [abs(error) for error, _ in errors]
  assert max(sizes) < 0.05, max(errors, key=lambda item: abs(item[0]))
  median, most = (f"{100 * x:.1f}%" for x in (statistics.median(sizes), max(sizes)))
  assert f"off by {median} (median) and at most {most}" in " ".join(PAGE.read_text().split())


@pytest.mark.parametrize(("family", "head_size"), [("opt", 0), ("modern", 0), ("modern", 8)])
@pytest.mark.parametrize(
  "optimizer", [{}, {"ema_decay": 0.9}, {"first_moment_dtype": "bfloat16"}, {"name": "muon"}]
)
def test_the_state_has_the_bytes_of_its_arrays(family, head_size, optimizer):
  """Includes arrays with the size of a head or of the width, which are too small to be sharded."""
  model = dataclasses.replace(SETTINGS.model, family=family, head_size=head_size)
  settings = dataclasses.replace(
    SETTINGS, model=model, optimizer=dataclasses.replace(SETTINGS.optimizer, **optimizer),
    train=dataclasses.replace(SETTINGS.train, global_batch_size=8),
  )  # fmt: skip
  mesh = mesh_of(1, 2, 2, 2)
  with jax.set_mesh(mesh):
    steps = compile_steps(model, settings.optimizer, settings.train, settings.vocab, 0)
    state = abstract(jax.eval_shape(steps.init), mesh)
  shares = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )
  assert memory.estimate(settings, mesh.shape).state == pytest.approx(sum(shares), rel=0.03)


def test_the_state_of_adapters_has_the_bytes_of_its_arrays_and_of_the_frozen_base():
  adapter = AdapterConfig(rank=4)
  model = dataclasses.replace(SETTINGS.model, dtype="bfloat16")
  train = dataclasses.replace(SETTINGS.train, global_batch_size=8)
  settings = dataclasses.replace(SETTINGS, model=model, train=train, adapter=adapter)
  mesh = mesh_of(1, 2, 2, 2)
  with jax.set_mesh(mesh):
    steps = compile_steps(model, settings.optimizer, train, settings.vocab, 0, adapter)
    state = abstract(jax.eval_shape(steps.init), mesh)
  shares = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )
  full = memory.estimate(dataclasses.replace(settings, adapter=AdapterConfig()), mesh.shape)
  base = full.state / 12 * 2  # Full training holds the parameters and two moments in fp32.
  assert memory.estimate(settings, mesh.shape).state == pytest.approx(sum(shares) + base, rel=0.03)


@pytest.mark.parametrize(
  ("family", "mesh", "rows", "gib"),
  [
    ("opt", (1, 4, 1, 4), 1, 3.28),
    ("opt", (1, 4, 1, 4), 4, 8.38),
    ("opt", (1, 4, 1, 1), 1, 5.57),
    ("opt", (1, 2, 1, 2), 8, 17.28),
    ("modern", (1, 4, 1, 4), 4, 10.05),
  ],
)
def test_the_estimate_for_adapters_is_near_the_compilers_numbers(family, mesh, rows, gib):
  """The compiler's numbers are those of the 7B with rank 16 on v5e-16 or v5p-8."""
  batch = rows * math.prod(mesh)
  settings = settings_of("cm3leon_7b", mesh, rows, "full", batch)
  model = dataclasses.replace(settings.model, family=family)
  settings = dataclasses.replace(settings, model=model, adapter=AdapterConfig(rank=16))
  assert -0.01 < estimated(settings).total / GIB / gib - 1 < 0.12


def test_more_rows_kept_values_and_passes_take_more():
  def total(rows=4, policy="full", mesh=(1, 16, 1, 16), batch=0):
    return estimated(settings_of("cm3leon_7b", mesh, rows, policy, batch)).total

  by_policy = [
    total(policy=policy)
    for policy in ("full", "offload", "save_attention", "save_qkv", "minimal", "none")
  ]
  assert by_policy == sorted(by_policy)
  assert total(2) < total(4) < total(8)
  assert total(batch=1_024) < total()  # With a single micro-batch, no sum of gradients is kept.
  assert total(mesh=(1, 16, 2, 8)) != total()
  # Replicas share the batch, but each has all parameters.
  assert total(mesh=(16, 16, 1, 1), batch=1_024) > total(batch=1_024)


def test_checked_steps_hold_state_and_batch_twice():
  settings = settings_of("cm3leon_7b", (1, 16, 1, 16), 4, "full")
  checking = dataclasses.replace(settings.train, replay_every=200)
  once, twice = estimated(settings), estimated(dataclasses.replace(settings, train=checking))
  assert (twice.state, twice.batch) == (2 * once.state, 2 * once.batch)
  assert twice.total == pytest.approx(once.total + once.state + once.batch)


def test_checked_steps_are_given_up_last():
  settings = settings_of("cm3leon_7b", (1, 16, 1, 16), 4, "save_attention")
  shape = settings.mesh.over(256)

  def advice(limit: float, **train) -> str:
    checked = dataclasses.replace(settings.train, **{"replay_every": 200, **train})
    with pytest.raises(UserError) as error:
      memory.check(dataclasses.replace(settings, train=checked), shape, int(limit))
    return str(error.value).split("; ")[1].split(". --skip")[0]

  fewer = "--config.train.rows_per_device"
  assert advice(estimated(settings).total).startswith(f"this fits: {fewer}=2")
  least = estimated(settings_of("cm3leon_7b", (1, 16, 1, 16), 1, "full")).total
  off, smallest = "--config.train.replay_every=0", f"{fewer}=1 --config.model.remat_policy=full"
  assert advice(least) == f"this fits: {off} {smallest}"
  both = f"{off} --config.train.replay_tolerance=0"
  assert advice(least, replay_tolerance=0.01) == f"this fits: {both} {smallest}"


def test_a_step_that_does_not_fit_names_the_flags_that_fit():
  settings = settings_of("cm3leon_7b", (1, 16, 1, 16), 32, "save_attention")
  shape, limit = settings.mesh.over(256), int(CHIPS["v5e"].hbm * GIB)
  with pytest.raises(UserError) as error:
    memory.check(settings, shape, limit)
  message = str(error.value)
  assert message.startswith("a step with 32 rows of 4,096 tokens per pass takes about 1")
  assert "of a device, which has 15.75; this fits: --config.train.rows_per_device=4. " in message
  fitting = settings_of("cm3leon_7b", (1, 16, 1, 16), 4, "save_attention")
  needed = int(memory.check(fitting, shape, limit).total)
  with refused(UserError):
    memory.check(fitting, shape, needed - 1)
  without = dataclasses.replace(settings.train, rows_per_device=0, gradient_accumulation_steps=2)
  policies = dataclasses.replace(settings.model, remat_policy="minimal", num_layers=64)
  with pytest.raises(UserError) as error:
    memory.check(dataclasses.replace(settings, train=without, model=policies), shape, limit)
  flags = (
    "this fits: --config.train.rows_per_device=4 --config.train.gradient_accumulation_steps=1 "
    "--config.model.remat_policy=full."
  )
  assert flags in str(error.value)
  few = MeshConfig(fsdp=4).over(4)
  with refused(UserError):
    memory.check(settings, few, limit)
  with refused(UserError):  # A single device cannot be split by `tensor`.
    memory.check(settings, MeshConfig(fsdp=1).over(1), limit)
  assert str(memory.Memory(1, 1_500 * GIB, 0, 0, 0, 0)).startswith("1,500.00 GiB (state 1,500.00, ")


def device(kind: str, platform: str = "tpu", stats=None):
  return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


# Rows of the table of updates: slice, config, data x fsdp x tensor x fsdp_inner, images, remat,
# GiB.
UPDATE = re.compile(r"\| v\w+-\d+ \| (sft_\w+) \| ([\d x]+) \| (\d+) \| (\w+) \| ([\d.]+) of")


def update_of(config: str, mesh: tuple, images: int, policy: str, family: str = "opt"):
  """Returns the settings and the mesh of a reinforcement update with `images` images per device."""
  settings = settings_of(config, mesh, 0, policy, images * math.prod(mesh) // mesh[2])
  model = dataclasses.replace(settings.model, family=family)
  return dataclasses.replace(settings, model=model), settings.mesh.over(math.prod(mesh))


def test_the_estimate_of_an_update_is_near_the_compilers_numbers():
  """Prompts have 896 and 3 tokens, as in the programs that were compiled."""
  errors = []
  for config, sizes, images, policy, gib in UPDATE.findall(PAGE.read_text()):
    mesh = tuple(map(int, sizes.split(" x ")))
    family = "modern" if config.endswith("_modern") else "opt"
    case = update_of(config.removesuffix("_modern"), mesh, int(images), policy, family)
    found = memory.estimate_update(*case, prompts=899).total / GIB
    errors.append((abs(found / float(gib) - 1), config, mesh, found, gib))
  assert len(errors) == 5
  assert max(errors)[0] < 0.05, max(errors)
  assert f"off by at most {100 * max(errors)[0]:.1f}%" in " ".join(PAGE.read_text().split())


def test_an_update_that_does_not_fit_names_the_flags_that_fit():
  settings, shape = update_of("sft_350m", (1, 2, 1, 2), 512, "minimal")
  limit = int(CHIPS["v5e"].hbm * GIB)
  with pytest.raises(UserError) as error:
    memory.check_update(settings, shape, limit)
  message = str(error.value)
  assert message.startswith("an update on 512 images of two streams takes at least ")
  flags = re.search(r"which has 15\.75; this fits: (.*)\. --skip_memory_check", message)[1]
  size = int(
    flags.removeprefix("--config.model.remat_policy=full --config.train.global_batch_size=")
  )
  assert size % settings.reinforce.samples == 0

  def fits(n):
    train = dataclasses.replace(settings.train, global_batch_size=n)
    model = dataclasses.replace(settings.model, remat_policy="full")
    other = dataclasses.replace(settings, train=train, model=model)
    return memory.estimate_update(other, shape).total <= limit

  assert fits(size)
  assert not fits(size + settings.reinforce.samples)
  assert memory.check_update(*update_of("sft_350m", (1, 2, 1, 2), 4, "minimal"), limit).rows == 4
  with refused(UserError):
    memory.check_update(*update_of("sft_7b", (1, 2, 1, 2), 1, "full"), limit)


def test_learning_from_rewards_refuses_before_it_reads_a_stage(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  settings = dataclasses.replace(SETTINGS, instructions=InstructionsConfig(tasks="scenes"))
  with refused(UserError):  # Memory is not checked on a CPU, so the error is the missing stage.
    reinforce_command.main(settings, workdir, "elsewhere")
  monkeypatch.setattr(memory, "device_memory", lambda device: 1_000)
  with refused(UserError):
    reinforce_command.main(settings, workdir, "elsewhere")
  with refused(UserError):
    reinforce_command.main(settings, workdir, "elsewhere", skip_memory_check=True)


def test_the_memory_of_a_device_is_what_its_backend_says_else_the_tables():
  assert memory.device_memory(device("TPU v5 lite", stats={"bytes_limit": 17})) == 17
  assert memory.device_memory(device("NVIDIA H100", "gpu", {"bytes_limit": 9})) == 9
  assert memory.device_memory(device("TPU v5 lite")) == 15.75 * GIB
  assert memory.device_memory(device("TPU v5")) == int(95.73 * GIB)
  assert memory.device_memory(device("TPU v9")) is None
  assert memory.device_memory(jax.devices()[0]) is None


def test_training_refuses_before_it_reads_a_stage(tmp_path, monkeypatch, capsys):
  workdir = epath.Path(tmp_path)
  with refused(UserError):  # Memory is not checked on a CPU, so the error is the missing stage.
    train_command.main(SETTINGS, workdir)
  monkeypatch.setattr(memory, "device_memory", lambda device: 1_000)
  with refused(UserError):
    train_command.main(SETTINGS, workdir)
  with refused(UserError):
    train_command.main(SETTINGS, workdir, skip_memory_check=True)
  monkeypatch.setattr(memory, "device_memory", lambda device: 16 * GIB)
  with refused(UserError):
    train_command.main(SETTINGS, workdir)
  assert "of 16.00." in capsys.readouterr().out
  mesh = dataclasses.replace(SETTINGS, mesh=MeshConfig(fsdp=3))
  with refused(UserError):
    train_command.main(mesh, workdir)
