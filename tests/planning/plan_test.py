"""Tests the plan of a run: its choices, numbers and error messages."""

import dataclasses
import json
import math
import re

import pytest
import yaml

from cm3leon_jax.commands import config_file
from cm3leon_jax.commands import plan as command
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import AXES, MeshConfig
from cm3leon_jax.planning import hardware, launchers, mesh_prices, plan, utilization
from cm3leon_jax.training.watch.flops import model_flops
from tests.launched import launch
from tests.refusals import check_refused, check_sentence, refused


def settings(name="cm3leon_350m", flags=(), **fields):
  """Returns the settings of a shipped config with changed fields and command-line flags."""
  config = config_file.load(name)
  for section, values in fields.items():
    config[section].update(values)
  for flag in flags:
    path, value = re.fullmatch(r"--config\.([\w.]+)=(.*)", flag).groups()
    section, field = path.split(".")
    config[section][field] = type(config[section][field])(value)
  return settings_from_config(config)


def make(config, topology="v5e-256", slices=1, mfu=0.4, bandwidth=0.25):
  return plan.make(config, hardware.load(topology, slices), mfu, bandwidth)


@pytest.fixture(scope="module")
def of_7b():
  return {chips: make(settings("cm3leon_7b"), f"v5e-{chips}") for chips in (64, 256)}


def test_the_7b_takes_the_time_and_the_disk_that_the_page_on_pods_computes(of_7b):
  made = of_7b[256]
  assert made.tokens_per_step == 8_192 * 4_096
  # 6.72e9 parameters of 12 bytes each; each of the 64 hosts writes 0.25 GB/s.
  assert made.parameters == pytest.approx(6.72e9, rel=0.01)
  assert made.checkpoint_bytes == pytest.approx(12 * made.parameters, rel=0.001)
  assert made.save_seconds == pytest.approx(81e9 / 64 / 0.25e9, rel=0.01)
  # 43.5 GFLOPs per token (docs/monitoring.md) at 40% of the peak of 256 x 197 TFLOP/s.
  assert made.step_seconds == pytest.approx(33.55e6 * 43.5e9 / (256 * 197e12 * 0.4), rel=0.01)
  assert made.days == pytest.approx(41_723 * made.step_seconds / 86_400)
  assert made.chip_hours == pytest.approx(made.days * 24 * 256)


@pytest.mark.parametrize(
  ("name", "topology", "mfu", "source"),
  [
    ("cm3leon_350m", "v6e-16", 0.351, "345M in Levanter"),
    ("cm3leon_7b", "v5e-256", 0.473, "6.7B in Levanter"),
    ("cm3leon_7b", "v6e-256", 0.404, "8B in MaxText"),
    ("cm3leon_7b", "tpu7x-256", 0.435, "Gemma 4 4B"),
    ("cm3leon_7b", "h200-64", 0.300, "torchtitan"),
  ],
)
def test_the_assumed_utilization_is_the_nearest_that_was_published(name, topology, mfu, source):
  made = make(settings(name), topology, mfu=None)
  assert made.mfu == mfu
  [line] = [x for x in plan.table(made, "x").splitlines() if x.startswith("  a step")]
  check_sentence(line, f"{made.step_mfu:.0%} of the peak (as", source, f"{mfu:.0%} with", "--mfu")
  assert "--mfu" not in plan.table(make(settings(name), topology), "x")


def test_a_cheaper_mesh_is_proposed_with_both_prices_and_flags_that_fit(of_7b):
  """With `tensor=8` the 7B moves more activations than it moves parameters without it."""
  mesh = {"data": 1, "fsdp": 32, "tensor": 8}
  made = make(settings("cm3leon_7b", mesh=mesh))
  now, best = made.cheaper
  assert (now.shape["tensor"], best.shape) == (8, {**of_7b[256].mesh})
  assert best.seconds < 0.98 * now.seconds
  [line] = [x for x in plan.table(made, "x").splitlines() if x.startswith("  cheaper mesh")]
  hours = [f"{x.seconds * 41_723 * 256 / 3600:,.0f}" for x in (best, now)]
  check_sentence(line, f"{hours[0]} chip-hours", *best.flags, f"this mesh {hours[1]} at best")
  taken = make(settings("cm3leon_7b", best.flags))
  assert taken.memory.total < taken.hardware.memory * 2**30
  assert taken.cheaper is of_7b[256].cheaper is make(settings(), "h100-64").cheaper is None


@pytest.mark.parametrize(
  ("shape", "rows", "gib"),
  [
    ((1, 16, 16, 1), 4, 26.58 + 13.69 + 2 * 0.31),
    ((1, 16, 16, 1), 1, (850.53 + 437.72 + 2 * 10.13) / 32),
    ((1, 8, 16, 2), 2, (450.84 + 229.91 + 2 * 334.25) / 32),
    ((8, 2, 8, 2), 2, (601.12 + 324.87 + 2 * 337.48) / 32),
  ],
)
def test_the_bytes_of_collectives_are_near_the_compilers(shape, rows, gib):
  """The 7B on v5e-256: GiB of a pass, gathered + scattered + twice all-reduced (docs/log.md)."""
  sent = mesh_prices.sent_bytes(settings("cm3leon_7b"), dict(zip(AXES, shape)), rows)
  assert sent / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(
  ("chip", "tokens_per_second", "peak"), [("v6e", 7_207, 918e12), ("h100", 5_762, 989.5e12)]
)
def test_published_utilization_has_the_definition_of_this_project(chip, tokens_per_second, peak):
  """The pages give tokens/s of Llama 3.1 8B, but their MFU counts attention to all keys."""
  llama = ModelConfig(family="modern", vocab_size=128_256, num_kv_heads=8, mlp_width=14_336)
  [measured] = [one for one in utilization.MEASURED if one.chip == chip]
  expected = model_flops(llama, tokens_per_second, 8_192) / peak
  assert measured.mfu == pytest.approx(expected, abs=5e-4)


def test_a_lighter_remat_policy_takes_less_time_and_is_proposed_if_it_fits():
  """The compiler counts 1.259, 1.210 and 1.062 times the model FLOPs (docs/scaling.md)."""
  made = {
    policy: make(settings("cm3leon_7b", model={"remat_policy": policy}), "v5p-256", mfu=None)
    for policy in ("full", "save_attention", "minimal")
  }
  full, middle, minimal = (one.step_seconds for one in made.values())
  assert full / minimal == pytest.approx(1.259 / 1.062, rel=1e-3)
  assert middle / minimal == pytest.approx(1.210 / 1.062, rel=1e-3)
  assert made["full"].step_mfu == pytest.approx(0.473)  # As the run that was measured.
  check_sentence(made["full"].faster, "16% less", "39.5 of", "--config.model.remat_policy=minimal")
  check_sentence(made["minimal"].faster, "8 rows", "--config.train.rows_per_device=8")
  flags = [made[policy].faster.split()[-1] for policy in ("full", "minimal")]
  assert make(settings("cm3leon_7b", flags), "v5p-256").faster == ""


def test_rows_that_a_core_cannot_give_are_reported(of_7b):
  made = of_7b[256]
  needed, given = made.rows_per_second
  assert needed * 64 * 4_096 == pytest.approx(made.tokens_per_second)
  # 64 hosts: for a row of its own, a core plans 64 rows and reads one.
  assert given == pytest.approx(1 / (64 * 4_096 / 88e6 + 4_096 / 6e6))
  fast = dataclasses.replace(made, step_seconds=made.step_seconds * needed / given * 0.99)
  assert "devices will wait" in plan.table(fast, "")
  slow = dataclasses.replace(made, step_seconds=made.step_seconds * needed / given * 1.01)
  assert "devices will wait" not in plan.table(slow, "")


def test_the_time_to_save_grows_on_a_small_slice(of_7b):
  assert of_7b[256].grace_seconds == 900
  assert of_7b[64].stop_seconds == pytest.approx(976, rel=0.08)  # See docs/pods.md.
  assert of_7b[64].grace_seconds == 1_200


@pytest.mark.parametrize(
  ("topology", "slices", "mesh", "saving"),
  [
    ("v5e-256", 1, (1, 16, 16, 1), 64),
    ("v5e-256", 2, (2, 16, 16, 1), 128),  # Replicas share a save.
    ("v5p-256", 1, (1, 16, 8, 1), 32),
    ("h100-64", 1, (8, 8, 1, 1), 8),
  ],
)
def test_the_mesh_follows_the_torus_and_its_flags_select_it(topology, slices, mesh, saving):
  made = make(settings(), topology, slices)
  assert tuple(made.mesh[axis] for axis in ("data", "fsdp", "fsdp_inner", "tensor")) == mesh
  assert made.saving_hosts == saving
  odd = {"model": {"num_layers": 25, "width": 2_040, "num_heads": 8}}
  if topology == "h100-64":  # 25 layers and 2,040 / 8 channels do not split into 8 parts.
    assert make(settings(**odd), topology).saving_hosts == 1
  selected = settings(flags=made.flags)
  assert selected.mesh.over(made.hardware.chips) == made.mesh
  assert make(selected, topology, slices) == dataclasses.replace(made, flags=())


def test_what_does_not_fit_becomes_smaller_and_its_flags_say_so():
  large = settings("cm3leon_7b", train={"rows_per_device": 32})
  made = make(large)
  assert made.rows_per_device < 32
  assert made.memory.total <= 15.75 * 2**30
  flags = [flag for flag in made.flags if not flag.startswith("--config.mesh.")]
  assert flags
  again = make(settings("cm3leon_7b", [*made.flags], train={"rows_per_device": 32}))
  assert (again.rows_per_device, again.remat_policy) == (made.rows_per_device, made.remat_policy)


def test_the_mesh_of_a_config_stays():
  mesh = {"data": 4, "fsdp": -1, "tensor": 2}
  made = make(settings(mesh=mesh), slices=2)
  assert made.mesh == MeshConfig(**mesh).over(512)
  assert not [flag for flag in made.flags if "mesh" in flag]


@pytest.mark.parametrize(
  ("config", "topology", "slices", "fact"),
  [
    ({"mesh": {"fsdp": 7}}, "v5e-256", 1, "config.mesh"),
    ({"mesh": {"fsdp": 512}}, "v5e-256", 2, "config.mesh.data"),
    ({"train": {"global_batch_size": 100}}, "v5e-256", 1, "global_batch_size"),
    ({}, "h100-24", 1, "global_batch_size"),
    (
      {"model": {"width": 32_768, "num_heads": 256, "mlp_width": 131_072}},
      "v5e-4",
      1,
      "more devices",
    ),
  ],
)
def test_what_the_hardware_cannot_run_is_refused(config, topology, slices, fact):
  with refused(UserError, fact):
    make(settings(**config), topology, slices)


# Tests of the command.


def test_flags_of_the_config_are_taken_from_the_command_line():
  argv = ["--topology=v5e-4", "--config=a.py:x", "--config.raw.source=a b=c", "-config.seed", "3"]
  given = ["--config=a.py:x", "--config.raw.source=a b=c", "--config.seed=3"]
  assert command.config_flags([*argv, "--configs=1"]) == given


def test_the_command_prints_a_plan_and_writes_the_files_of_every_launcher(tmp_path):
  result = launch(
    "plan", "--config=ml_configs/cm3leon_350m.py:paper", "--config.seed=3", "--topology=v5e-256",
    "--workdir=gs://bucket/350m", f"--out={tmp_path}", "--image=i", "--queue=tpus",
    "--train_flag=--init_from=gs://bucket/old", "--config.train.wandb=cats", "--pairs=5000000",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert "\ngke_jobset.yaml: WANDB_API_KEY comes from a Secret: " in result.stdout
  assert result.stdout.startswith("cm3leon-350m-paper on v5e-256: 256 chips, 64 hosts\n")
  for name in ("mesh", "remat", "rows of a device", "memory of a device", "tokens/s", "the run"):
    assert re.search(rf"^  {name} +\S", result.stdout, re.MULTILINE), name
  assert "\nstages, estimates for 5,000,000 pairs (--pairs; the run reads each " in result.stdout
  assert re.search(r"\n  train_clip .* on one host only, .* or none with a pub", result.stdout)
  numbers = json.loads((tmp_path / "plan.json").read_text())
  assert numbers["pairs"] == 5_000_000
  assert {cost["stage"] for cost in numbers["stages"]} >= {"build_neighbors", "train"}
  assert numbers["job"]["grace_seconds"] == 900
  files = {"gke_jobset.yaml", "tpu_vm.sh", "plan.json"}
  assert {path.name for path in tmp_path.iterdir()} == files
  manifest = yaml.safe_load((tmp_path / "gke_jobset.yaml").read_text())
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["args"] == [
    "--distributed", "--config=ml_configs/cm3leon_350m.py:paper", "--config.seed=3",
    "--config.train.wandb=cats", "--workdir=gs://bucket/350m", *numbers["flags"],
    "--init_from=gs://bucket/old",
  ]  # fmt: skip


TOPOLOGY = "--topology=v5e-256"
WRITES = [TOPOLOGY, "--out=out", "--workdir=gs://b/7b"]


@pytest.mark.parametrize(
  "flags",
  [
    [],
    [TOPOLOGY, "--out=out"],
    [*WRITES, "--train_flag=--init-from=gs://b/old"],
    pytest.param([*WRITES, "--memory_gib=100000"], marks=pytest.mark.slow),
  ],
)
def test_wrong_flags_are_refused_before_a_number_is_printed(tmp_path, flags):
  check_refused(launch("plan", "--config=cm3leon_350m", *flags, cwd=tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_a_plan_for_tpu7x_counts_two_devices_per_chip():
  """A device of tpu7x has 1,153.5 TFLOP/s. The file for GKE counts chips."""
  made = make(settings("cm3leon_7b"), "tpu7x-128")
  assert math.prod(made.mesh.values()) == 128
  assert made.step_seconds == pytest.approx(33.55e6 * 43.5e9 / (128 * 1153.5e12 * 0.4), rel=0.01)
  assert made.chip_hours == pytest.approx(made.days * 24 * 64)
  assert made.saving_hosts == 16
  job = launchers.PodJob("j", made.hardware, ("--workdir=gs://bucket/7b",), image="i")
  files = launchers.files(job)
  assert "tpu_vm.sh" not in files
  assert "tpu_vm.sh: tpu7x runs in GKE only." in launchers.remarks(job)
  assert 'google.com/tpu: "4"' in files["gke_jobset.yaml"]
  assert "gke-tpu-accelerator: tpu7x" in files["gke_jobset.yaml"]
