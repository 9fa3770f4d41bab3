r"""Compiles training, evaluation and decoding for TPUs or GPUs, and prints memory and FLOPs.

  pip install 'libtpu>=0.0.52,<0.0.53'
  cm3leon aot_compile --config=cm3leon_7b --topology=v5e-256 \
    --config.mesh.fsdp=16 --config.mesh.fsdp_inner=16 --batch_per_device=4
  cm3leon aot_compile --config=cm3leon_7b --topology=h100-8 --program=decode

The command needs no TPU or GPU: on any x86-64 Linux machine, the real compiler, XLA, compiles the
programs that a pod runs. For GPUs it is in the packages jax-cuda12-plugin and jax-cuda12-pjrt
(docs/installation.md). The evaluation program computes the held-out loss of one micro-batch of
`cm3leon train`. Without a mesh in the config, `tensor` spans the devices of a host for decoding,
as in `cm3leon generate`, because `fsdp` would gather the parameters at each step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from etils import epath, epy
from pydantic import PositiveInt

from cm3leon_jax.commands import common, flag
from cm3leon_jax.config.settings import Settings, decoding_mesh
from cm3leon_jax.config.training import on_mesh
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.mesh import MeshConfig, batch_shards, create_mesh

with epy.lazy_imports():
  import jax

  from cm3leon_jax.decoding import request
  from cm3leon_jax.planning import gpus, memory, programs, report
  from cm3leon_jax.planning import topology as topologies
  from cm3leon_jax.training.step import grpo
  from cm3leon_jax.training.watch import flops


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  topology: str
  """TPU slice, e.g. v5e-256 or v5p:4x4x8, or type and number of GPUs, e.g. h100-64."""
  slices: PositiveInt = 1
  """Number of slices."""
  program: Literal["train", "evaluate", "decode", "all", "reinforce"] = "train"
  """Program to compile; `all` compiles train, evaluate and decode."""
  batch_per_device: PositiveInt | None = None
  """Rows per device in a step without gradient accumulation (default: the config's)."""
  decode_batch: PositiveInt | None = None
  """Prompts per decoder batch, with two guidance streams each (default: 64, or one per batch shard
  if there are more than 64 shards)."""
  decode_positions: PositiveInt = 1_152
  """Positions per decoded sample, for prompt and image."""
  json: str | None = None
  """JSON file to write the reports to."""


def _mesh(settings: Settings, topology: topologies.Topology) -> jax.sharding.Mesh:
  try:
    return create_mesh(settings.mesh, topology.devices)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error


def _train_report(
  topology: topologies.Topology, settings: Settings, mesh: jax.sharding.Mesh
) -> dict:
  numbers = _model_numbers(settings, mesh, settings.train.global_batch_size)
  result = {**numbers, **report.compile_report(programs.train_step(settings, mesh), topology)}
  estimate = memory.estimate(settings, mesh.shape, topology.devices[0].platform)
  result["estimate_gib"] = estimate.total / report.GIB
  result["floor"] = {"estimated memory": str(estimate)}
  return result


def _evaluate_report(
  topology: topologies.Topology, settings: Settings, mesh: jax.sharding.Mesh
) -> dict:
  """Reports the costs of the program that computes the held-out loss of a micro-batch.

  The memory total includes the rest of the training state, which stays in memory while the program
  runs.
  """
  numbers = _model_numbers(settings, mesh, settings.train.micro_batch_size)
  # A train step takes 6 FLOPs per trained parameter and token. The forward pass takes 2 of them.
  length = settings.data.sequence_length
  numbers["model_flops"] = flops.model_flops(settings.model, numbers["tokens"], length) / 3
  step, rest_bytes = programs.evaluation(settings, mesh)
  result = {**numbers, **report.compile_report(step, topology)}
  rest = rest_bytes / report.GIB
  result["rest_gib"] = rest
  total = f"{result['sum_gib'] + rest:.2f} GiB in total"
  result["floor"] = {"rest of the state": f"{rest:.2f} GiB; {total}"}
  return result


def _reinforce_report(
  topology: topologies.Topology, settings: Settings, mesh: jax.sharding.Mesh, positions: int
) -> dict:
  """Reports the costs of one update of `cm3leon reinforce`, without the costs of sampling.

  `positions` is the number of positions of the stream with the prompt. The other has no prompt.
  """
  codes = settings.vqgan.image_tokens
  prompts = positions - codes + len(request.unconditional_prompt(settings.vocab))
  rows, length = settings.train.global_batch_size, grpo.row_length(prompts, 2, codes)
  numbers = _model_numbers(settings, mesh, rows, length)
  numbers["model_flops"] *= 4 / 3  # Includes the forward pass of the reference parameters.
  return {
    **numbers,
    **report.compile_report(programs.policy_step(settings, mesh, prompts), topology),
  }


def _model_numbers(settings: Settings, mesh: jax.sharding.Mesh, rows: int, length: int = 0) -> dict:
  """Returns the number of parameters, and the tokens and model FLOPs of a step with `rows` rows."""
  length = length or settings.data.sequence_length
  return {
    "parameters": programs.count_params(settings, mesh),
    "tokens": rows * length,
    "model_flops": flops.model_flops(settings.model, rows * length, length, settings.tuned),
  }


def _decode_reports(
  topology: topologies.Topology,
  settings: Settings,
  mesh: jax.sharding.Mesh,
  prompts: int,
  positions: int,
) -> dict[str, dict]:
  """Reports the costs of the prefill, and of one decode step with a full cache."""
  lowered, weights, cache = programs.guided_decoder(settings, mesh, prompts, positions)
  first, last = lowered.steps
  before, seconds = report.compile_for(first, topology)
  compiled = before
  if last is not first:
    compiled, seconds = report.compile_for(last, topology)
  step = report.report(compiled, seconds, topology)
  step["slots"] = [seen.shape[1] for seen in lowered.state.seen]
  floor, bandwidth = weights + cache, topology.chip.hbm_bandwidth
  step["floor_bytes"] = floor
  step |= {"weights_gib": weights / report.GIB, "cache_gib": cache / report.GIB}
  rate = prompts * bandwidth / floor
  moved, least, of_weights, of_cache = (
    f"{x / report.GIB:.3f}" for x in (step["traffic"], floor, weights, cache)
  )
  step["floor"] = {
    "bytes of a step": f"{moved} GiB moved; at least {least}: {of_weights} weights, "
    f"{of_cache} cache",
    "least time of a step": f"{floor / bandwidth * 1e3:.2f} ms, {rate:,.0f} tokens/s",
  }
  return {"decode": step, "prefill": report.compile_report(lowered.prefill(before), topology)}


def main(settings: Settings, flags: Flags) -> None:
  topologies.prepare()
  topology = gpus.load(flags.topology, flags.slices)
  reports: dict[str, Any] = {}
  if flags.program == "decode" and settings.mesh == MeshConfig():
    chosen = decoding_mesh(settings.model, topology.devices)
    settings = dataclasses.replace(settings, mesh=chosen)
  mesh = _mesh(settings, topology)
  if flags.batch_per_device:
    rows = flags.batch_per_device * len(topology.devices) // settings.mesh.tensor
    train = dataclasses.replace(
      settings.train, global_batch_size=rows, gradient_accumulation_steps=1, rows_per_device=0
    )
    settings = dataclasses.replace(settings, train=train)
  shape = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
  devices = f"{len(topology.devices)} x {topology.devices[0].device_kind}"
  where = f"{slices}{topology.name}, {devices}; {shape}"
  if flags.program in ("train", "evaluate", "all"):
    train = on_mesh(settings.train, batch_shards(mesh))
    settings = dataclasses.replace(settings, train=train)
  train, length = settings.train, settings.data.sequence_length
  positions = flags.decode_positions
  if flags.program in ("train", "all"):
    passes = f"{train.global_batch_size} rows of {length} in {train.gradient_accumulation_steps}"
    title = f"train step on {where}; {passes} passes, remat {settings.model.remat_policy}"
    reports["train"] = _train_report(topology, settings, mesh)
    print(report.table(title, reports["train"]), flush=True)
  if flags.program in ("evaluate", "all"):
    title = f"held-out loss on {where}; {train.micro_batch_size} rows of {length}"
    reports["evaluate"] = _evaluate_report(topology, settings, mesh)
    print(report.table(title, reports["evaluate"]), flush=True)
  if flags.program == "reinforce":  # `reinforce` does not accumulate gradients.
    settings = dataclasses.replace(settings, train=dataclasses.replace(train, rows_per_device=0))
    title = f"reinforce step on {where}; {train.global_batch_size} images of two streams"
    reports["reinforce"] = _reinforce_report(topology, settings, mesh, positions)
    print(report.table(title, reports["reinforce"]), flush=True)
  if flags.program in ("decode", "all"):
    prompts = flags.decode_batch or max(64, batch_shards(mesh))
    reports |= _decode_reports(topology, settings, mesh, prompts, positions)
    batch = f"{prompts} prompts of two streams, {positions} positions"
    print(report.table(f"decode step on {where}; {batch}", reports["decode"]))
    print(report.table(f"prefill on {where}; {batch}", reports["prefill"]), flush=True)
  if flags.json:
    write_json(epath.Path(flags.json), {"topology": topology.name, **reports})


if __name__ == "__main__":
  common.run(main, Flags, workdir=False)
