"""Tests that the decode programs compiled ahead of time are those that a Generator runs."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import compile as compile_lib
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.mesh import abstract
from cm3leon_jax.planning import programs
from tests.decoding.small import IMAGE, POSITIONS, VOCAB, model_config
from tests.generation.run import SETTINGS
from tests.models.tiny import mesh_of, random_params

PROMPTS = 4


def settings_of():
  """Returns the sections that the decoder reads."""
  vqgan = type("VQGAN", (), {"image_tokens": IMAGE})()
  data = type("Data", (), {"sequence_length": POSITIONS})()
  sampling = dataclasses.replace(GeneratorConfig.__dataclass_fields__["sampling"].default, top_k=9)
  sections = {"vqgan": vqgan, "data": data, "sampling": sampling}
  return type("Settings", (), {"model": model_config(), "vocab": VOCAB, **sections})()


@pytest.fixture
def lowered(monkeypatch):
  """Collects all programs that are lowered, prefill and steps."""
  found, steps, before = [], compile_lib.lower_steps, compile_lib.jit_before

  def lower_steps(*args):
    found.append(steps(*args))
    return found[-1]

  def jit_before(function, program):
    jitted = before(function, program)
    found.append(jitted)
    return jitted

  monkeypatch.setattr(compile_lib, "lower_steps", lower_steps)
  monkeypatch.setattr(compile_lib, "jit_before", jit_before)
  # So that the cache grows.
  monkeypatch.setattr(batch_lib, "BUCKET", 4)
  monkeypatch.setattr(compile_lib, "ROOM", 1)
  return found


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_programs_are_those_of_a_generator(lowered, shape):
  settings, mesh = settings_of(), mesh_of(*shape)
  decoder = programs.guided_decoder(settings, mesh, PROMPTS, 16)
  first, last = decoder.lowered.steps
  assert first.as_text() != last.as_text()  # Before and after the cache has grown.
  planned = {first.as_text(), last.as_text()}
  prefill = decoder.lowered.prefill(first.compile()).as_text()
  lowered.clear()
  words = 16 - IMAGE - 1 - 2
  captions = np.random.default_rng(1).integers(8, 264, (PROMPTS, words))
  with jax.set_mesh(mesh):
    compile_lib.programs_of.cache_clear()
    generator = Generator(random_params(settings.model), GeneratorConfig.of(settings))
    requests = [request.text_to_image(VOCAB, IMAGE, caption) for caption in captions]
    generator.generate(requests, range(PROMPTS))
    run = {x.as_text() for x in lowered if isinstance(x, jax.stages.Lowered)}
    arrays, _ = generator.config.batch(requests, range(PROMPTS), [False] * PROMPTS)
    first_jitted = next(x for x in lowered if not isinstance(x, jax.stages.Lowered))
    arguments = (generator.params.model, arrays.prompts, arrays.control.plan)
    found = first_jitted.lower(*(abstract(x, mesh) for x in arguments)).as_text()
  compile_lib.programs_of.cache_clear()
  assert run == planned
  assert found == prefill


def test_an_average_takes_4_bytes_of_each_parameter_over_the_mesh():
  """In the arguments of a train step, and beside an evaluation, which reads the average."""
  mesh, train = mesh_of(1, 4, 1, 2), dataclasses.replace(SETTINGS.train, global_batch_size=8)
  arguments, rest = [], []
  for decay in (0.0, 0.999):
    optimizer = dataclasses.replace(SETTINGS.optimizer, ema_decay=decay)
    settings = dataclasses.replace(SETTINGS, train=train, optimizer=optimizer)
    state, _ = programs.train_step(settings, mesh).args_info[0]
    arguments.append(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)))
    rest.append(programs.evaluation(settings, mesh).rest_bytes)
  parameters = programs.count_params(SETTINGS, mesh)
  assert arguments[1] - arguments[0] == 4 * parameters
  assert rest[1] - rest[0] == 4 * parameters / 8


def test_wrong_positions_and_batches_are_refused():
  with pytest.raises(UserError, match="--decode_positions is 9; an image and its end take 7"):
    programs.guided_decoder(settings_of(), mesh_of(1, 1, 1), PROMPTS, 9)
  with pytest.raises(UserError, match=r"--decode_batch is 3; .* = 4 must divide it"):
    programs.guided_decoder(settings_of(), mesh_of(2, 2, 2), 3, 16)
