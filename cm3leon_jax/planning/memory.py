"""Estimates the memory of a step on one device, before anything is read or compiled.

The formulas count the large arrays of a train step, or of an update of `cm3leon reinforce`, as XLA
plans them. docs/scaling.md compares estimates with XLA's numbers. For Muon, the estimate includes
the optimizer state, but not the arrays of its update.
"""

# K layers, D width, F feed-forward, N heads, H head size, V vocabulary, L length, R rows per device
# in one pass, I codes per image, C image codes.

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math

import jax

from cm3leon_jax import distributed
from cm3leon_jax.config.model import AdapterConfig, ModelConfig, RematPolicy
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.training import OptimizerConfig, on_mesh
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import BATCH
from cm3leon_jax.models.transformer import KEPT
from cm3leon_jax.planning import shares
from cm3leon_jax.planning.topology import device_memory
from cm3leon_jax.training.step.grpo import LONG_BUCKET, row_length

GIB = 2**30
LANES = 128  # Lanes of a TPU register. The last dimension of an array is padded to a multiple.
ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}
SCORES = {"gpu": 6}  # Bytes per logit or attention weight, besides the compute dtype; TPU: 8.


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device at the peak of a step.

  Attributes:
    rows: R, the number of rows per pass (not bytes).
    state: parameters, optimizer moments and the average of the parameters; twice their bytes if
      steps are checked (`train.replay_every`). For `cm3leon reinforce`, also the initial model in
      the compute dtype. Frozen parameters are in the compute dtype.
    batch: input arrays of a whole step.
    accumulation: sum of the gradients of all passes; 0 if a step has only one pass.
    kept: activations that the layers keep for the backward pass.
    working: everything else at the peak: parameters in the compute dtype, gradients, and the arrays
      of the loss, of one layer or of the update.
  """

  rows: int
  state: float
  batch: float
  accumulation: float
  kept: float
  working: float

  @property
  def total(self) -> float:
    """Sum of all bytes."""
    return self.state + self.batch + self.accumulation + self.kept + self.working

  def __str__(self) -> str:
    names = {"state": "state", "kept": "values kept for the backward pass", "working": "working"}
    parts = [f"{text} {getattr(self, name) / GIB:,.2f}" for name, text in names.items()]
    if self.accumulation:
      parts.append(f"sum of gradients {self.accumulation / GIB:,.2f}")
    return f"{self.total / GIB:,.2f} GiB ({', '.join(parts)})"


def estimate(settings: Settings, shape: Mapping[str, int], platform: str = "tpu") -> Memory:
  """Estimates the memory of a train step on one device.

  `shape` contains the size of each mesh axis, as in `jax.sharding.Mesh.shape` and
  `MeshConfig.over`. `platform` is "tpu" or "gpu".

  Raises:
    UserError: the batch is not evenly divisible among the devices of the mesh.
  """
  model, L, tensor = settings.model, settings.data.sequence_length, shape["tensor"]
  batch_shards = math.prod(shape[axis] for axis in BATCH)
  train = on_mesh(settings.train, batch_shards)
  R = train.micro_batch_size // batch_shards
  tuned = settings.tuned
  params, matrices, tables, whole = shares.trained(model, tuned, shape)
  b, tokens, D = ITEMSIZE[model.dtype], R * L, model.width
  kept = tokens * D * model.num_layers * b * kept_widths(model, tensor, platform)
  # `copy` is the layers in the compute dtype, which is also the dtype of their gradients.
  copy, gradients = (matrices * b if b < 4 else 0), matrices * b
  table = (4 + b) * model.vocab_size / tensor * D  # Gradient of the input table.
  frozen = (shares.trained(model, None, shape)[0] - whole) * b
  if isinstance(tuned, AdapterConfig):
    copy, table, gradients = 0, 0, 4 * params  # The gradients of adapters are in fp32.
  elif tuned is not None:
    table *= tuned.first_row("embed") is not None
    kept *= tuned.backward(model) / model.num_layers
  phases = (
    kept + copy + _loss(model, R, L, tensor, platform, bool(frozen)),
    kept + copy + gradients + 4 * tables + _layer(model, R, L, tensor, platform, bool(frozen)),
    gradients + table,
    8 * params,  # Gradients and updates, in fp32.
  )
  # XLA:TPU sums the table's gradient over replicas during the next pass.
  overlapped = table if shape["data"] > 1 and platform == "tpu" else 0
  accumulated = train.gradient_accumulation_steps > 1
  fields = 6 if settings.instructions.any else 5
  states = 2 if train.replay_every else 1
  return Memory(
    rows=R,
    state=states * (frozen + params * 4 + _optimizer_bytes(settings.optimizer, params, matrices)),
    batch=states * 4 * fields * L * train.global_batch_size / batch_shards,
    accumulation=4 * params * accumulated,
    kept=kept,
    working=max(phases) - kept + overlapped,
  )


def estimate_update(
  settings: Settings, shape: Mapping[str, int], prompts: int = 0, platform: str = "tpu"
) -> Memory:
  """Estimates the memory of an update of `cm3leon reinforce` on one device.

  The memory of the programs that generate the samples is not estimated. `train.global_batch_size`
  counts samples, each with two streams in one row. `prompts` is the number of tokens in both
  prompts of a sample, by default that of the shortest rows.
  """
  model, tensor, codes = settings.model, shape["tensor"], settings.vqgan.image_tokens
  batch_shards = math.prod(shape[axis] for axis in BATCH)
  R = -(-settings.train.global_batch_size // batch_shards)
  L = row_length(prompts, 2, codes)
  params, matrices, tables, _ = shares.trained(model, None, shape)
  b, D = ITEMSIZE[model.dtype], model.width
  # Without a kernel, heads are not padded, and all attention weights are in memory.
  kernel = platform if L % LONG_BUCKET == 0 else "plain"
  widths = kept_widths(model, tensor, kernel)
  kept = R * L * D * model.num_layers * b * widths
  weights = R * model.num_heads / tensor * L * L / 2 * (4 + b) if kernel == "plain" else 0
  copy, gradients = (matrices * b if b < 4 else 0), matrices * b
  log_probs = 4 * R * codes * settings.vocab.image_size / tensor
  table = model.vocab_size / tensor * D
  image_table = 8 * settings.vocab.image_size * D  # Rows of image codes, and their gradient.
  layer = max(0, _layer(model, R, L, tensor, kernel) - R * L * D * b * (widths - 1)) + weights
  phases = (
    kept + copy + model.vocab_size * D * b + image_table + 3 * log_probs,
    kept + copy + gradients + 4 * tables + image_table + layer,
    gradients + (4 + b) * table + image_table,
    4 * params,  # Gradients in fp32.
  )
  return Memory(
    rows=R,
    state=params * (4 + b) + _optimizer_bytes(settings.optimizer, params, matrices),
    batch=4 * (3 * R * L + 3 * R * codes),
    accumulation=0,
    kept=kept,
    working=max(phases) - kept,
  )


def _optimizer_bytes(config: OptimizerConfig, params: float, matrices: float) -> float:
  """Computes the bytes of the optimizer moments and of the average of the parameters."""
  first = ITEMSIZE[config.first_moment_dtype]
  second = params - matrices if config.name == "muon" else params
  return first * params + 4 * second + (4 * params if config.ema_decay else 0)


def kept_widths(model: ModelConfig, tensor: int = 1, platform: str = "tpu") -> float:
  """Counts the values that a layer keeps per token for the backward pass, divided by the width.

  `tensor` is the number of devices that share the heads and the feed-forward dimension.
  """
  heads = model.num_heads * _held_head(model, platform) / model.width / tensor
  keys = model.key_heads * _held_head(model, platform) / model.width / tensor
  mlp = (2 if model.traits.gated else 1) * model.mlp_width / model.width / tensor
  widths = {"qkv": heads + 2 * keys, "attention": heads, "middle": 1, "mlp": mlp}
  policy = model.remat_policy
  if policy == "none":  # Norms and activations are also kept in fp32.
    return 8 + sum(widths.values()) + mlp
  # XLA:TPU still keeps half of the values that are offloaded to host memory on the device.
  return 1 + sum(widths[name] for name in KEPT.get(policy, ("middle",)))


def _held_head(model: ModelConfig, platform: str) -> int:
  """Returns the size of a head in memory. On TPUs, kernels pad it to a multiple of `LANES`."""
  return -(-model.head_dim // LANES) * LANES if platform == "tpu" else model.head_dim


def _loss(
  model: ModelConfig, R: int, L: int, tensor: int, platform: str, frozen: bool = False
) -> float:
  """Computes the bytes of the loss: table, its fp32 gradient, a chunk of logits, hidden states.

  A frozen table has no gradient, but XLA:TPU also keeps the copy that the look-up gathered.
  """
  b, V = ITEMSIZE[model.dtype], model.vocab_size / tensor
  chunk = R * min(L, model.loss_chunk) * V * (SCORES.get(platform, 8) + b)
  return V * model.width * (b + (b if frozen else 4)) + chunk + 2 * R * L * model.width * b


def _layer(
  model: ModelConfig, R: int, L: int, tensor: int, platform: str, frozen: bool = False
) -> float:
  """Computes the bytes of a layer's backward pass: its parameters twice, and activations.

  Frozen parameters, which have no gradients, count once. With their adapters, a layer has more
  activations, and XLA:TPU also keeps the table that the look-up gathered.
  """
  b, F = ITEMSIZE[model.dtype], model.mlp_width / tensor
  params = shares.parameters(model)[0] / model.num_layers / tensor
  products = 3 if model.traits.gated else 2
  scores = 0.0
  plain = model.attention == "plain" or model.head_dim & (model.head_dim - 1)
  if platform == "gpu" and plain:  # No kernel, so all attention weights are in memory.
    scores = R * model.num_heads / tensor * L * L / 2 * (SCORES["gpu"] + b)
  heads = 2 * (model.num_heads + model.key_heads) * _held_head(model, platform)
  widths = 2 * model.width + heads + products * F
  if frozen:
    widths += 2 * model.width + (products - 1) * F
    return params * b + R * L * widths * b + scores + model.vocab_size / tensor * model.width * b
  return 2 * params * b + R * L * widths * b + scores


def smaller(
  settings: Settings, shape: Mapping[str, int], platform: str = "tpu"
) -> Iterator[tuple[Settings, str]]:
  """Yields settings of the same step that need less memory, and the flags that select them.

  Settings with fewer rows per pass are first, followed by those with the remat policy `full`.
  Settings without checked steps (`train.replay_every`) are last, because the user requested checks.
  """
  yield from _fewer_rows(settings, shape, platform)
  if not settings.train.replay_every:
    return
  train = dataclasses.replace(settings.train, replay_every=0)
  unchecked, flags = dataclasses.replace(settings, train=train), "--config.train.replay_every=0"
  for other, more in _fewer_rows(unchecked, shape, platform):
    yield other, f"{flags} {more}"


def _fewer_rows(
  settings: Settings, shape: Mapping[str, int], platform: str
) -> Iterator[tuple[Settings, str]]:
  """Yields settings with fewer rows per pass, then also with the remat policy `full`."""
  shards = math.prod(shape[axis] for axis in BATCH)
  now = estimate(settings, shape, platform).rows
  rows = settings.train.global_batch_size // shards
  divisors = [n for n in range(now, 0, -1) if rows % n == 0]
  for policy in dict.fromkeys((settings.model.remat_policy, "full")):
    model = dataclasses.replace(settings.model, remat_policy=policy)
    for n in divisors:
      other, flags = with_rows(settings, n)
      if policy != settings.model.remat_policy:
        flags.append(f"--config.model.remat_policy={policy}")
      yield dataclasses.replace(other, model=model), " ".join(flags)


def with_rows(settings: Settings, rows: int) -> tuple[Settings, list[str]]:
  """Returns settings with `rows` rows per device and pass, and the flags that select them."""
  train = dataclasses.replace(settings.train, rows_per_device=rows, gradient_accumulation_steps=1)
  flags = [f"--config.train.rows_per_device={rows}"]
  if settings.train.gradient_accumulation_steps > 1:
    flags.append("--config.train.gradient_accumulation_steps=1")
  return dataclasses.replace(settings, train=train), flags


def excess(settings: Settings, memory: Memory, limit: float) -> str:
  """Returns the beginning of an error message: a step needs more than `limit` bytes per device."""
  return (
    f"a step with {memory.rows} rows of {settings.data.sequence_length:,} tokens per pass takes "
    f"about {memory} of a device, which has {limit / GIB:.2f}"
  )


def check(
  settings: Settings, shape: Mapping[str, int], limit: int, platform: str = "tpu"
) -> Memory:
  """Checks that a train step fits into memory, and returns its `estimate`.

  `limit` is the number of bytes of a device (`device_memory`). For the other arguments, see
  `estimate`.

  Raises:
    UserError: the step does not fit (the message names flags with which it fits), or the batch is
      not evenly divisible among the devices.
  """
  memory = estimate(settings, shape, platform)
  if memory.total <= limit:
    return memory
  fits = (
    flags
    for other, flags in smaller(settings, shape, platform)
    if estimate(other, shape, platform).total <= limit
  )
  remedy = next(fits, "")
  advice = f"this fits: {remedy}"
  if not remedy:
    advice = "no smaller batch or other remat policy fits: take more devices"
    if shape["tensor"] < math.prod(shape.values()):
      advice += ", or a larger mesh.tensor"
  raise UserError(
    f"{excess(settings, memory, limit)}; {advice}. --skip_memory_check starts it anyway."
  )


def check_update(
  settings: Settings, shape: Mapping[str, int], limit: int, platform: str = "tpu"
) -> Memory:
  """Checks that an update fits into memory, and returns its `estimate_update`. See `check`."""
  memory = estimate_update(settings, shape, platform=platform)
  if memory.total <= limit:
    return memory
  fits = (
    flags
    for other, flags in _smaller_updates(settings, shape)
    if estimate_update(other, shape, platform=platform).total <= limit
  )
  remedy = next(fits, "")
  advice = f"this fits: {remedy}" if remedy else "no fewer images fit: take more devices"
  raise UserError(
    f"an update on {memory.rows} images of two streams takes at least {memory} of a device, "
    f"which has {limit / GIB:.2f}; {advice}. --skip_memory_check starts it anyway."
  )


def _smaller_updates(
  settings: Settings, shape: Mapping[str, int]
) -> Iterator[tuple[Settings, str]]:
  """Yields settings whose updates need less memory, and the flags that select them."""
  size = settings.train.global_batch_size
  full: RematPolicy = "full"
  step = math.lcm(settings.reinforce.samples, math.prod(shape[axis] for axis in BATCH))
  for n in (size, *range(size - size % step, 0, -step)):
    train = dataclasses.replace(settings.train, global_batch_size=n)
    model = dataclasses.replace(settings.model, remat_policy=full)
    flags = [f"--config.model.remat_policy={full}"] * (settings.model.remat_policy != full)
    flags += [f"--config.train.global_batch_size={n}"] * (n != size)
    yield dataclasses.replace(settings, train=train, model=model), " ".join(flags)


def check_devices(
  settings: Settings, mesh: jax.sharding.Mesh, check_step: Callable[..., Memory] = check
) -> None:
  """Prints the memory that a step needs on each device, if the device's memory is known.

  All processes must call this function. `check_step` is `check` or `check_update`.

  Raises:
    UserError: `check_step` raises it in at least one process. In this case, all processes raise it.
  """
  with distributed.together():
    device = mesh.local_devices[0]
    limit = device_memory(device)
    if limit is None:
      return
    memory = check_step(settings, mesh.shape, limit, device.platform)
  distributed.print_once(
    f"memory: a step with {memory.rows} rows per device and pass takes about {memory} of "
    f"{limit / GIB:.2f}."
  )
