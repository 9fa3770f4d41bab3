import dataclasses
import math

from etils import epath
import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from cm3leon_jax.config.settings import Settings, settings_from_config
from cm3leon_jax.data.rows.loader import batches
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import programs as compile_lib
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import abstract, spec
from cm3leon_jax.planning import programs
from cm3leon_jax.run.rows import open_rows
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state
from cm3leon_jax.training.steps import compile_steps
from tests.decoding.small import IMAGE, POSITIONS, VOCAB, model_config
from tests.generation.run import SETTINGS
from tests.launch import tiny_instruct_config
from tests.launch.stages_before import make_workdir
from tests.models.tiny import mesh_of, random_params
from tests.refusals import refused

PROMPTS = 4


def settings_of():
  vqgan = type("VQGAN", (), {"image_tokens": IMAGE})()
  data = type("Data", (), {"sequence_length": POSITIONS})()
  sampling = dataclasses.replace(GeneratorConfig.__dataclass_fields__["sampling"].default, top_k=9)
  sections = {"vqgan": vqgan, "data": data, "sampling": sampling}
  settings = object.__new__(Settings)  # Bypasses the checks, which the fake sections would fail.
  for name, section in {"model": model_config(), "vocab": VOCAB, **sections}.items():
    object.__setattr__(settings, name, section)
  return settings


@pytest.fixture
def lowered(monkeypatch):
  """Returns a list that collects all programs that are lowered: prefill and steps."""
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
  # Small buckets, so that the cache must grow.
  monkeypatch.setattr(batch_lib, "BUCKET", 4)
  monkeypatch.setattr(compile_lib, "CAPACITY", 1)
  return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
def test_the_programs_are_those_of_a_generator(lowered, shape):
  settings, mesh = settings_of(), mesh_of(*shape)
  programs_of_decoder, _, _ = programs.guided_decoder(settings, mesh, PROMPTS, 16)
  first, last = programs_of_decoder.steps
  assert first.as_text() != last.as_text()  # The cache grew between the first and the last steps.
  planned = {first.as_text(), last.as_text()}
  prefill = programs_of_decoder.prefill(first.compile()).as_text()
  lowered.clear()
  words = 16 - IMAGE - 1 - 2
  captions = np.random.default_rng(1).integers(8, 264, (PROMPTS, words))
  with jax.set_mesh(mesh):
    compile_lib.programs_of.cache_clear()
    generator = Generator(random_params(settings.model), GeneratorConfig.of(settings))
    requests = [request.text_to_image(VOCAB, IMAGE, caption) for caption in captions]
    generator.generate(requests, range(PROMPTS))
    run = {x.as_text() for x in lowered if isinstance(x, jax.stages.Lowered)}
    arrays, _ = generator.config.batch(requests, range(PROMPTS))
    first_jitted = next(x for x in lowered if not isinstance(x, jax.stages.Lowered))
    arguments = (generator.params.model, arrays.prompts, arrays.control.plan)
    found = first_jitted.lower(*(abstract(x, mesh) for x in arguments)).as_text()
  compile_lib.programs_of.cache_clear()
  assert run == planned
  assert found == prefill


def test_an_average_takes_4_bytes_of_each_parameter_over_the_mesh():
  """Training reads the average; a held-out evaluation leaves the average in memory."""
  mesh, train = mesh_of(1, 4, 1, 2), dataclasses.replace(SETTINGS.train, global_batch_size=8)
  arguments, rest = [], []
  for decay in (0.0, 0.999):
    optimizer = dataclasses.replace(SETTINGS.optimizer, ema_decay=decay)
    settings = dataclasses.replace(SETTINGS, train=train, optimizer=optimizer)
    state, _ = programs.train_step(settings, mesh).args_info[0]
    arguments.append(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)))
    rest.append(programs.evaluation(settings, mesh)[1])
  parameters = programs.count_params(SETTINGS, mesh)
  assert arguments[1] - arguments[0] == 4 * parameters
  assert rest[1] - rest[0] == 4 * parameters / 8


@pytest.mark.parametrize("replay_share", [0.0, 0.4])
def test_the_steps_of_a_tuning_are_those_of_its_run(tmp_path, replay_share):
  """The programs sum the losses of each source of the run's rows, in training and evaluation."""
  config = tiny_instruct_config.get_config()
  config.instructions.replay_share = replay_share
  first, second = config.instructions.own_tasks
  config.instructions.own_tasks = ({**first, "heldout": ""}, second)
  settings, mesh = settings_from_config(config), mesh_of(2, 2, 2)
  make_workdir(tmp_path, settings)
  rows = {split: open_rows(settings, epath.Path(tmp_path), split) for split in ("train", "heldout")}
  names = {split: loader.source_names for split, loader in rows.items()}
  assert names["heldout"] == names["train"][1:]
  assert len(names["train"]) == (4 if replay_share else 2)
  planned = programs.train_step(settings, mesh), programs.evaluation(settings, mesh)[0]
  with jax.set_mesh(mesh):
    steps = compile_steps(
      settings.model, settings.optimizer, settings.train, settings.vocab, settings.seed
    )
    sharding = NamedSharding(mesh, spec("batch", "length"))
    batch = {s: next(batches(rows[s], 0, 8, sharding)) for s in rows}
    state = abstract(jax.eval_shape(steps.init), mesh)
    sums = {s: {"num_sources": len(names[s])} for s in rows}
    run = (
      steps.train.lower(state, abstract(batch["train"], mesh), **sums["train"]),
      steps.evaluate.lower(state.eval_params, abstract(batch["heldout"], mesh), **sums["heldout"]),
    )
  assert [x.as_text() for x in planned] == [x.as_text() for x in run]


@pytest.mark.slow
def test_the_update_of_reinforce_is_that_of_its_run():
  train = dataclasses.replace(SETTINGS.train, global_batch_size=8)
  settings, mesh, codes = dataclasses.replace(SETTINGS, train=train), mesh_of(2, 2, 2), 16
  planned = programs.policy_step(settings, mesh, 40)
  with jax.set_mesh(mesh):
    row = (np.arange(20 + codes), np.arange(20 + codes))
    arrays = grpo.pack_rows([[row] * 2] * 8, codes, 0)
    numbers = (np.zeros((8, codes), np.int32), np.zeros((8, codes, 2), np.float32))
    rollout = grpo.place(grpo.Rollout(*arrays, *numbers, np.zeros(8, np.float32)))
    params = random_params(settings.model)
    optimizer = create_optimizer(settings.optimizer, settings.train.steps)
    state = init_state(settings.model, optimizer, jax.random.key(0))
    configs = settings.model, settings.optimizer, settings.reinforce
    step = grpo.compile_step(*configs, settings.train.steps, settings.vocab.text_size)
    run = step.lower(abstract(state, mesh), abstract(params, mesh), abstract(rollout, mesh))
  assert planned.as_text() == run.as_text()


def test_wrong_positions_and_batches_are_refused():
  with refused(UserError, "positions"):
    programs.guided_decoder(settings_of(), mesh_of(1, 1, 1), PROMPTS, 9)
  with refused(UserError, "3"):
    programs.guided_decoder(settings_of(), mesh_of(2, 2, 2), 3, 16)
