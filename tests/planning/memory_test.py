"""Tests memory estimates against the compiler's numbers, and what does not fit."""

import dataclasses
import functools
import math
import re
import types

from etils import epath
import jax
import pytest

from benchmarks.speed import cards
from cm3leon_jax.commands import config_file
from cm3leon_jax.commands import reinforce as reinforce_command
from cm3leon_jax.commands import train as train_command
from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import MeshConfig, abstract
from cm3leon_jax.planning import memory, programs
from cm3leon_jax.planning.topology import CHIPS
from cm3leon_jax.training.steps import compile_steps
from tests.generation.run import SETTINGS
from tests.models.tiny import mesh_of
from tests.refusals import refused

GIB = 2**30
# Compiled train steps: config, mesh (data, fsdp, tensor, fsdp_inner), rows per device, passes (0:
# as the batch of the config needs), remat policy, GiB per device.
COMPILED = [
  ("cm3leon_7b", (1, 16, 1, 8), 4, 1, "full", 7.48),
  ("cm3leon_7b", (1, 16, 1, 16), 2, 1, "full", 4.17),
  ("cm3leon_7b", (1, 2, 1, 2), 4, 1, "full", 31.56),
  ("cm3leon_7b", (1, 2, 1, 2), 4, 1, "minimal", 63.28),
  ("cm3leon_7b", (1, 16, 1, 16), 4, 1, "full", 6.60),
  ("cm3leon_7b", (1, 16, 1, 16), 4, 1, "offload", 11.11),
  ("cm3leon_7b", (1, 16, 1, 16), 4, 1, "save_attention", 14.63),
  ("cm3leon_350m", (1, 16, 1, 16), 8, 1, "minimal", 21.20),
  ("cm3leon_350m", (1, 2, 1, 2), 32, 1, "minimal", 85.82),
  ("cm3leon_760m", (1, 16, 1, 16), 2, 1, "minimal", 6.62),
  ("cm3leon_760m", (1, 2, 1, 2), 16, 1, "minimal", 53.11),
  ("sft_7b", (1, 2, 1, 2), 4, 32, "full", 37.97),
  ("sft_350m", (1, 16, 1, 16), 2, 1, "minimal", 5.45),
  ("sft_350m", (1, 2, 1, 2), 32, 4, "minimal", 86.27),
  ("sft_760m", (1, 2, 1, 2), 16, 8, "minimal", 53.88),
  ("cm3leon_7b", (1, 2, 1, 2), 4, 0, "minimal", 70.00),
  ("cm3leon_7b", (1, 16, 1, 8), 8, 0, "minimal", 81.09),
  ("cm3leon_7b", (1, 8, 2, 16), 2, 0, "minimal", 11.57),
  ("cm3leon_7b", (1, 16, 1, 16), 2, 0, "save_qkv", 12.64),
  ("cm3leon_7b", (2, 16, 1, 16), 4, 0, "full", 8.54),
]


def settings_of(config: str, mesh: tuple, rows: int, policy: str, global_batch_size: int = 0):
  """Returns the settings of a shipped config with a mesh of (data, fsdp, tensor, fsdp_inner)."""
  values = config_file.load(config)
  values.mesh.update(dict(zip(("data", "fsdp", "tensor", "fsdp_inner"), mesh, strict=True)))
  values.model.remat_policy = policy
  values.train.rows_per_device = rows
  if global_batch_size:
    values.train.global_batch_size = global_batch_size
  return settings_from_config(values)


def estimated(settings) -> memory.Memory:
  devices = math.prod(settings.mesh.shape)
  return memory.estimate(settings, settings.mesh.over(devices))


@pytest.mark.parametrize(("config", "mesh", "rows", "passes", "policy", "gib"), COMPILED)
def test_the_estimate_is_near_the_compilers_number(config, mesh, rows, passes, policy, gib):
  batch = rows * passes * math.prod(mesh) // mesh[2]
  settings = settings_of(config, mesh, rows, policy, batch)
  assert estimated(settings).total / GIB == pytest.approx(gib, rel=0.05)


GPU_CARDS = [
  card
  for card in cards.CARDS
  if card.gpu and card.compiled == "train" and card.name in cards.stored(card.size)
]


@pytest.mark.parametrize("card", GPU_CARDS, ids=lambda card: f"{card.size}/{card.name}")
def test_the_estimate_is_near_the_number_of_the_compiler_for_gpus(card):
  place = cards.PLACES[card.where]
  mesh = (place.hosts, place.fsdp[0], 1, place.fsdp[1])
  rows = 4 if card.size in cards.PRETRAINED else 1
  settings = settings_of(cards.config_of(card.size), mesh, rows, "full")
  attention = "plain" if card.program == "plain" else "auto"
  model = dataclasses.replace(settings.model, attention=attention)
  settings = dataclasses.replace(settings, model=model)
  estimate = memory.estimate(
    settings, settings.mesh.over(place.hosts * math.prod(place.fsdp)), "gpu"
  )
  stored = cards.stored(card.size)[card.name]
  assert estimate.total / GIB == pytest.approx(stored["sum_gib"], rel=0.05)


def bytes_of_state(settings, mesh) -> int:
  """Returns the bytes that the arrays of a training state take on each device."""
  model, optimizer, train = settings.model, settings.optimizer, settings.train
  with jax.set_mesh(mesh):
    steps = compile_steps(model, optimizer, train, settings.vocab, 0, settings.tuned)
    state = jax.tree.leaves(abstract(jax.eval_shape(steps.init), mesh))
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)


@pytest.mark.parametrize(
  ("family", "fields"),
  [
    ("opt", {}),
    ("modern", {}),
    ("modern", {"head_size": 8}),
    ("modern", {"num_kv_heads": 2, "num_layers": 2, "width": 256}),
  ],
)
@pytest.mark.parametrize(
  "optimizer", [{}, {"ema_decay": 0.9}, {"first_moment_dtype": "bfloat16"}, {"name": "muon"}]
)
def test_the_state_has_the_bytes_of_its_arrays(family, fields, optimizer):
  """Includes arrays with the size of a head or of the width, which are too small to be sharded."""
  model = dataclasses.replace(SETTINGS.model, family=family, **fields)
  settings = dataclasses.replace(
    SETTINGS, model=model, optimizer=dataclasses.replace(SETTINGS.optimizer, **optimizer),
    train=dataclasses.replace(SETTINGS.train, global_batch_size=8),
  )  # fmt: skip
  mesh = mesh_of(1, 2, 2, 2)
  expected = bytes_of_state(settings, mesh)
  assert memory.estimate(settings, mesh.shape).state == pytest.approx(expected, rel=0.03)


def test_the_state_of_adapters_has_the_bytes_of_its_arrays_and_of_the_frozen_base():
  adapter = AdapterConfig(rank=4)
  model = dataclasses.replace(SETTINGS.model, dtype="bfloat16")
  train = dataclasses.replace(SETTINGS.train, global_batch_size=8)
  settings = dataclasses.replace(SETTINGS, model=model, train=train, adapter=adapter)
  mesh = mesh_of(1, 2, 2, 2)
  full = memory.estimate(dataclasses.replace(settings, adapter=AdapterConfig()), mesh.shape)
  base = full.state / 12 * 2  # Full training holds the parameters and two moments in fp32.
  expected = bytes_of_state(settings, mesh) + base
  assert memory.estimate(settings, mesh.shape).state == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
  "names", [("head.image",), ("embed", "head.image"), ("layers.1-2",), ("layers",)]
)
def test_the_state_of_groups_has_the_bytes_of_its_arrays_and_of_the_frozen_rest(names):
  sizes = {"family": "modern", "dtype": "bfloat16", "num_layers": 3, "width": 256}
  model = dataclasses.replace(SETTINGS.model, **sizes)
  train = dataclasses.replace(SETTINGS.train, global_batch_size=8, only=names)
  settings, mesh = dataclasses.replace(SETTINGS, model=model, train=train), mesh_of(1, 2, 2, 2)
  with jax.set_mesh(mesh):
    base = jax.tree.leaves(programs._base(settings, mesh))
  frozen = sum(2 * math.prod(x.sharding.shard_shape(x.shape)) for x in base)
  expected = bytes_of_state(settings, mesh) + frozen
  assert memory.estimate(settings, mesh.shape).state == pytest.approx(expected, rel=0.03)


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


def test_a_step_that_does_not_fit_names_the_flags_that_fit():
  settings = settings_of("cm3leon_7b", (1, 16, 1, 16), 32, "save_attention")
  shape, limit = settings.mesh.over(256), int(CHIPS["v5e"].hbm * GIB)
  numbers = "a step with 32 rows of 4,096 tokens per pass takes about 1"
  flag = "of a device, which has 15.75; this fits: --config.train.rows_per_device=4. "
  with refused(UserError, numbers, flag):
    memory.check(settings, shape, limit)
  fitting = settings_of("cm3leon_7b", (1, 16, 1, 16), 4, "save_attention")
  needed = int(memory.check(fitting, shape, limit).total)
  with refused(UserError, "rows_per_device"):
    memory.check(fitting, shape, needed - 1)
  without = dataclasses.replace(settings.train, rows_per_device=0, gradient_accumulation_steps=2)
  policies = dataclasses.replace(settings.model, remat_policy="minimal", num_layers=64)
  flags = (
    "this fits: --config.train.rows_per_device=4 --config.train.gradient_accumulation_steps=1 "
    "--config.model.remat_policy=full."
  )
  with refused(UserError, flags):
    memory.check(dataclasses.replace(settings, train=without, model=policies), shape, limit)
  with refused(UserError, "take more devices", "mesh.tensor"):
    memory.check(settings, MeshConfig(fsdp=4).over(4), limit)


def device(kind: str, platform: str = "tpu", stats=None):
  return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


def update_of(config: str, mesh: tuple, images: int, policy: str, family: str = "opt"):
  """Returns the settings and the mesh of a reinforcement update with `images` images per device."""
  settings = settings_of(config, mesh, 0, policy, images * math.prod(mesh) // mesh[2])
  model = dataclasses.replace(settings.model, family=family)
  return dataclasses.replace(settings, model=model), settings.mesh.over(math.prod(mesh))


@pytest.mark.parametrize(
  ("config", "mesh", "images", "policy", "family", "gib"),
  [
    ("sft_7b", (1, 16, 1, 8), 1, "full", "opt", 2.49),
    ("sft_350m", (1, 2, 1, 2), 4, "minimal", "opt", 5.42),
    ("sft_350m", (1, 2, 1, 2), 8, "full", "opt", 2.77),
    ("sft_7b", (1, 2, 1, 2), 2, "full", "opt", 29.96),
    ("sft_350m", (1, 2, 1, 2), 2, "full", "modern", 2.57),
  ],
)
def test_the_estimate_of_an_update_is_near_the_compilers_number(
  config, mesh, images, policy, family, gib
):
  """Prompts have 896 and 3 tokens, as in the programs that were compiled."""
  case = update_of(config, mesh, images, policy, family)
  found = memory.estimate_update(*case, prompts=899).total / GIB
  assert found == pytest.approx(gib, rel=0.05)


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
  with refused(UserError, "take more devices"):
    memory.check_update(*update_of("sft_7b", (1, 2, 1, 2), 1, "full"), limit)


@pytest.mark.parametrize("command", ["train", "reinforce"])
def test_a_command_refuses_before_it_reads_a_stage(tmp_path, monkeypatch, command):
  settings = dataclasses.replace(SETTINGS, instructions=InstructionsConfig(tasks="cm3leon"))
  run = functools.partial(train_command.main, SETTINGS, epath.Path(tmp_path))
  if command == "reinforce":
    run = functools.partial(reinforce_command.main, settings, epath.Path(tmp_path))
  given = train_command.Flags(init_from="elsewhere" * (command == "reinforce"))
  monkeypatch.setattr(memory, "device_memory", lambda device: 1_000)
  with refused(UserError, "--skip_memory_check"):
    run(given)
  for skipped, limit in ((True, 1_000), (False, None)):  # Then a stage or the start is missing.
    monkeypatch.setattr(memory, "device_memory", lambda device, limit=limit: limit)
    with pytest.raises(UserError) as error:
      run(dataclasses.replace(given, skip_memory_check=skipped))
    assert "GiB" not in str(error.value)


def test_the_memory_of_a_device_is_what_its_backend_says_else_the_tables():
  assert memory.device_memory(device("TPU v5 lite", stats={"bytes_limit": 17})) == 17
  assert memory.device_memory(device("NVIDIA H100", "gpu", {"bytes_limit": 9})) == 9
  assert memory.device_memory(device("TPU v5 lite")) == 15.75 * GIB
  assert memory.device_memory(device("TPU v5")) == int(95.73 * GIB)
  assert memory.device_memory(device("TPU v9")) is None
  assert memory.device_memory(jax.devices()[0]) is None
