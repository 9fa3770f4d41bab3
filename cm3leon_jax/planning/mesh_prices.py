"""Compares meshes by the time of a step, and names one that is cheaper than that of the plan."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import operator

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.mesh import AXES, BATCH, FSDP
from cm3leon_jax.models.transformer import KEPT
from cm3leon_jax.planning import memory, shares
from cm3leon_jax.planning.hardware import Hardware
from cm3leon_jax.planning.topology import CHIPS
from cm3leon_jax.training.watch.flops import hardware_flops

SUMS = 5  # All-reduces of a layer's activations over `tensor`: forward, backward, computed again.
LEAST = 0.02  # Smaller savings are within the error of an estimate.


@dataclasses.dataclass(frozen=True)
class Option:
  """A mesh with the remat policy and rows that make its step fastest, and the seconds of a step."""

  seconds: float
  shape: Mapping[str, int]
  flags: tuple[str, ...]


def cheaper(
  settings: Settings, shape: Mapping[str, int], hardware: Hardware, step_seconds: float
) -> tuple[Option, Option] | None:
  """Returns (the plan's mesh, the cheapest one), each with its best policy and rows.

  The price of a step is the time of its FLOPs (`step_seconds` for the policy of `settings`) plus
  that of its collectives, at the speed of all links of a chip together. Returns None if no mesh
  that follows the torus saves `LEAST`, and for GPUs, whose links are unknown.
  """
  if hardware.platform != "tpu":
    return None
  torus = [n for n in hardware.torus if n > 1] or [1]
  outer, inner = math.prod(torus[:-1]), torus[-1] * hardware.devices_per_chip
  shapes = (
    dict(zip(AXES, (hardware.slices * data, outer // data, inner // tensor, tensor), strict=True))
    for data in _divisors(outer)
    for tensor in _divisors(inner)
  )
  seconds = operator.attrgetter("seconds")
  now = min(_options(settings, shape, hardware, step_seconds), key=seconds, default=None)
  every = (option for s in shapes for option in _options(settings, s, hardware, step_seconds))
  best = min(every, key=seconds, default=None)
  if now is None or best is None or best.seconds > (1 - LEAST) * now.seconds:
    return None
  return now, best


def _divisors(number: int) -> list[int]:
  return [n for n in range(number, 0, -1) if number % n == 0]


def _options(
  settings: Settings, shape: Mapping[str, int], hardware: Hardware, step_seconds: float
) -> Iterator[Option]:
  """Yields an option for each remat policy, with the most rows in a pass that fit."""
  rows, rest = divmod(settings.train.global_batch_size, math.prod(shape[axis] for axis in BATCH))
  try:
    settings.check_split(shape)
  except ValueError:
    return
  row = 1, settings.data.sequence_length, settings.tuned
  for policy in KEPT if not rest else ():
    model = dataclasses.replace(settings.model, remat_policy=policy)
    seconds = step_seconds * hardware_flops(model, *row) / hardware_flops(settings.model, *row)
    for n in _divisors(rows):
      other, flags = memory.with_rows(dataclasses.replace(settings, model=model), n)
      if memory.estimate(other, shape).total <= hardware.memory * memory.GIB:
        sent = rows // n * sent_bytes(other, shape, n)
        mesh = (f"--config.mesh.{axis}={size}" for axis, size in shape.items())
        every = (*mesh, *flags, f"--config.model.remat_policy={policy}")
        yield Option(seconds + sent / CHIPS[hardware.chip].ici_bandwidth, shape, every)
        break


def sent_bytes(settings: Settings, shape: Mapping[str, int], rows: int) -> float:
  """Computes the bytes of a device's collectives in a pass with `rows` rows of its own.

  Parameters are gathered for the forward and the backward pass, gradients are reduce-scattered,
  over one fsdp axis and then the other, and all-reduced over `data`; activations are all-reduced
  over `tensor`. Bytes are those of whole arrays, twice for all-reduces, as in a card.
  """
  model, b = settings.model, memory.ITEMSIZE[settings.model.dtype]
  fsdp = math.prod(shape[axis] for axis in FSDP)
  everything = shares.trained(model, None, shape)[0]
  trained = shares.trained(model, settings.tuned, shape)[0]
  gathered = (2 * everything + trained) * (fsdp > 1) * (fsdp + shape["fsdp_inner"])
  activations = SUMS * model.num_layers * rows * settings.data.sequence_length * model.width
  return b * (gathered + 2 * (trained * (shape["data"] > 1) + activations * (shape["tensor"] > 1)))
