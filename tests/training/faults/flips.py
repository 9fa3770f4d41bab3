"""A tiny training with `train.replay_every` in which bits flip.

One bit flips at one of three places:
- in a parameter or an optimizer moment on one device, after a step and before a checked step;
- in one replica of such an array, some unchecked steps before the checked step;
- in a gradient or an update on one device, in one of the computations of a checked step.

The array, device, element, bit and computation are random. The checked step must detect the flip,
and its message must name the affected device, and at most one other: that of the other computation
or of the only other replica. Steps without a flip must report nothing.
"""

import contextlib
import dataclasses
import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import AXES, spec
from cm3leon_jax.training.faults.fingerprint import names_of
from cm3leon_jax.training.faults.replay import Replay
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import train_step
from cm3leon_jax.training.steps import checked_step, compile_steps
from tests.data.stores import VOCAB
from tests.models import tiny
from tests.training.step.state_test import make_batch

KINDS = ("parameters", "moments", "gradients", "updates")
REPLICAS = ("one replica of parameters", "one replica of moments")
# Kind of a flip between steps -> regex for the names of the arrays in which a bit may flip.
OF_STATE = dict(zip(("parameters", "moments", *REPLICAS), (r"^params", r"\.(mu|nu)\.") * 2))
EVERY = 5  # `replay_every` in trials that flip a bit of one replica or no bit.
NONE = (-1, 0, 0)  # Array -1: no bit flips.


def flipped(tree, fault):
  """Flips a bit of one array of a tree on one device. Runs under jit.

  Args:
    tree: tree of fp32 arrays.
    fault: int32 [4]: index of the device in the mesh, index of the array (-1: flip no bit), index
      of the element (modulo the size of the device's part), and bit.
  """

  leaves, structure = jax.tree.flatten(tree)
  specs = [jax.typeof(x).sharding.spec for x in leaves]

  def on_device(leaves, fault):
    here = jax.lax.axis_index(AXES) == fault[0]
    found = []
    for i, x in enumerate(leaves):
      words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
      at = (jnp.arange(x.size) == fault[2] % x.size) & here & (fault[1] == i)
      words ^= at.astype(jnp.uint32) << fault[3].astype(jnp.uint32)
      found.append(jax.lax.bitcast_convert_type(words.reshape(x.shape), x.dtype))
    return found

  found = jax.shard_map(on_device, in_specs=(specs, jax.P(None)), out_specs=specs, check_vma=False)(
    leaves, fault
  )
  return jax.tree.unflatten(structure, found)


def flip_on_device(x, device, element: int, bit: int):
  """Returns an array with a bit flipped on one device only; other replicas stay unchanged."""
  held = []
  for shard in x.addressable_shards:
    if shard.device == device:
      words = np.array(shard.data).view(np.uint32)
      words.reshape(-1)[element % words.size] ^= np.uint32(1 << bit)
      held.append(jax.device_put(words.view(x.dtype), device))
    else:
      held.append(shard.data)
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, held)


class Trainer:
  """A tiny training on 8 devices of this process, in which bits flip."""

  def __init__(self, shape: tuple[int, int, int], passes: int, layers: int = 3):
    """Compiles the steps of the training.

    Args:
      shape: sizes of the axes data, fsdp and tensor.
      passes: number of micro-batches per step.
      layers: number of layers of the decoder.
    """

    self.mesh = tiny.mesh_of(*shape)
    model = dataclasses.replace(tiny.CONFIG, num_layers=layers)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9)
    self._config = TrainConfig(
      steps=10_000, global_batch_size=8, gradient_accumulation_steps=passes, replay_every=2
    )
    with jax.set_mesh(self.mesh):
      steps = compile_steps(model, optimizer, self._config, VOCAB, 0)
      self._steps = dataclasses.replace(steps, checked=self._checked)
      self._state = steps.init()
    sections = (model, optimizer, self._config, VOCAB)
    self._jitted = jax.jit(functools.partial(_faulty_step, *sections), donate_argnums=0)
    self._flips: list[tuple] = []

  def _checked(self, state, batch, num_sources=0):
    """Runs one computation of a checked step, with the next planned flip."""
    del num_sources
    mesh = jax.sharding.get_mesh()
    device, *numbers = self._flips.pop(0) if self._flips else (None, NONE, NONE)
    place = 0 if device is None else mesh.devices.flatten().tolist().index(device)
    faults = [np.int32([place, *n]) for n in numbers]
    replicated = jax.sharding.NamedSharding(mesh, jax.P(None))
    return self._jitted(state, batch, *jax.device_put(faults, replicated))

  def _batch(self, seed: int) -> dict:

    sharding = jax.sharding.NamedSharding(self.mesh, spec("batch", "length"))
    return {
      name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
      for name, x in make_batch(seed).items()
    }

  def trial(self, kind: str, rng: np.random.Generator) -> dict:
    """Runs steps, of which only the last is checked. Flips a bit, unless `kind` is "none".

    Returns:
      "kind"; "where": place of the flip; "found": whether the check detected it; "named": whether
      the message names the affected device, and at most one other; "recovered": whether the final
      state is bitwise equal to the state of a run without a flip, or None if the run stopped;
      "sentence": the message.
    """

    device = self.mesh.devices.flat[rng.integers(self.mesh.size)]
    element, bit = int(rng.integers(2**31)), int(rng.integers(32))
    steps = 2 if kind in KINDS else EVERY
    # Flip before the step that precedes the checked step: that step computes a fingerprint, which
    # would reveal a later flip.
    flips_after = 1 + int(rng.integers(EVERY - 2)) if kind in REPLICAS else 1
    config = dataclasses.replace(self._config, replay_every=steps)
    with jax.set_mesh(self.mesh), contextlib.redirect_stdout(io.StringIO()):
      batches = [self._batch(int(rng.integers(1_000))) for _ in range(steps)]
      expected = self._run(self._state, batches)
      replay = Replay(self._steps, config, 0, self.mesh)
      state, where = _copy(self._state), ""
      try:
        for step, batch in enumerate(batches, 1):
          state = jax.block_until_ready(replay(state, batch)[0])  # See `_run`.
          if step == flips_after:
            where, state = self._inject(kind, state, device, element, bit, rng)
        recovered = _same(state, expected)
      except UserError:
        recovered = None
      finally:
        self._flips.clear()
    devices = set(re.findall(r"device (\d+) \([^)]*\) of process (\d+)", replay.fault))
    faulty = (f"{device.id}", f"{device.process_index}")
    return {
      "kind": kind,
      "where": f"{where}, after step {flips_after}" if kind in REPLICAS else where,
      "found": bool(replay.fault),
      "named": faulty in devices and len(devices) <= 2,
      "recovered": recovered,
      "sentence": replay.fault,
    }

  def _inject(self, kind: str, state, device, element: int, bit: int, rng):
    """Flips a bit of the state now, or plans a flip in the next step. Returns (place, state)."""

    if kind in OF_STATE:
      names, (leaves, structure) = names_of(state), jax.tree.flatten(state)
      of_kind = [i for i, name in enumerate(names) if re.search(OF_STATE[kind], name)]
      i = of_kind[rng.integers(len(of_kind))]
      leaves[i] = flip_on_device(leaves[i], device, element, bit)
      return f"{names[i]}, device {device.id}, bit {bit}", jax.tree.unflatten(structure, leaves)
    if kind == "none":
      return "", state
    names = names_of(state.params)
    i, computation = int(rng.integers(len(names))), int(rng.integers(2))
    flip = (i, element, bit)
    flips = (flip, NONE) if kind == "gradients" else (NONE, flip)
    self._flips = [(device, NONE, NONE)] * computation + [(device, *flips)]
    return f"{names[i]}, device {device.id}, bit {bit}, computation {computation}", state

  def _run(self, state, batches: list):
    """Takes steps without flips and checks the last of them; returns the state."""
    state = _copy(state)
    for batch in batches[:-1]:
      # On few cores, collectives of several unfinished steps may block each other.
      state = jax.block_until_ready(self._steps.train(state, batch)[0])
    return self._checked(state, batches[-1])[0]


def _faulty_step(model, optimizer_config, config, vocab, state, batch, gradients, updates):
  """Runs a checked step with a bit flip in its gradients or updates, see `flipped`.

  The bit of a gradient flips before anything reads the gradient. The bit of an update flips after
  the optimizer has computed the update.
  """

  optimizer = create_optimizer(optimizer_config, config.steps)

  def flip_updates(found, opt_state, params):
    found, opt_state = optimizer.update(found, opt_state, params)
    return flipped(found, updates), opt_state

  def make_step(watched):
    def flip_gradients(found, opt_state, params):
      return watched.update(flipped(found, gradients), opt_state, params)

    faulty = optax.GradientTransformation(watched.init, flip_gradients)
    passes, decay = config.gradient_accumulation_steps, optimizer_config.ema_decay
    step = functools.partial(train_step, model, faulty, vocab.text_size, passes)
    return functools.partial(step, ema_decay=decay)

  return checked_step(make_step, optax.GradientTransformation(optimizer.init, flip_updates))(
    state, batch
  )


def _copy(tree):
  return jax.tree.map(lambda x: x.copy(), tree)


def _same(a, b) -> bool:
  """Returns whether the shards of two trees on the devices of this process are bitwise equal."""

  def content(tree) -> list[bytes]:
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return [np.asarray(s.data).tobytes() for s in sorted(shards, key=lambda s: s.device.id)]

  return content(a) == content(b)
