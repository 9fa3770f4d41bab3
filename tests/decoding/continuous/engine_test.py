"""Tests that samples equal those of `Generator.generate`, whatever else is admitted or removed."""

import copy
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.continuous import state as state_lib
from cm3leon_jax.decoding.continuous.buckets import bucket_of
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator, NoFreeSlot, StepFailed
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.programs import Programs
from cm3leon_jax.errors import UserError
from tests.decoding.small import (
  IMAGE,
  MIXTURE,
  POSITIONS,
  SEEDS,
  VOCAB,
  A,
  guided_requests,
  model_config,
  on_mesh,
  plain_requests,
  small_generator,
)
from tests.models.tiny import random_params, with_repeated_heads
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("one_device")

# Settings of the samples in one batch, some of which use top-p, others contrastive decoding.
SAMPLINGS = [
  MIXTURE,
  dataclasses.replace(MIXTURE, temperature=0.7, top_p=0.5, guidance=5.0, contrastive_alpha=0.1),
  dataclasses.replace(MIXTURE, top_k=5, text_top_k=7, text_temperature=3.0, edit_guidance=2.0),
]

# Tolerance of log_probs, by number of streams. Guidance multiplies errors of logits by up to 3 (two
# streams) or 7.5 (three streams).
ROUNDING = {1: 1e-5, 2: 3e-5, 3: 1e-4}


# A request whose prompt needs a wider bucket.
LONG = request_lib.document(VOCAB, IMAGE, [np.arange(20, 60)], 7)


def cases_of(generator, groups, samplings=SAMPLINGS):
  """Generates each group of requests with each sampling: (request, seed, sampling, result)."""
  cases = []
  for requests, (i, sampling) in itertools.product(groups, enumerate(samplings)):
    seeds = [SEEDS[0] + n + 20 * i for n in range(len(requests))]
    results = generator.generate(requests, seeds, sampling=sampling)
    cases += zip(requests, seeds, itertools.repeat(sampling), results)
  return cases


@pytest.fixture(scope="module")
def generator(plain_generator):
  """Returns a copy of `plain_generator` for batches of up to 8 samples."""
  generator = copy.copy(plain_generator)
  generator.config = dataclasses.replace(generator.config, batch_size=8)
  return generator


@pytest.fixture(scope="module")
def all_cases(generator):
  """Returns cases of one stream, two streams, and one stream with a long prompt."""
  with on_mesh():
    return cases_of(generator, [[*plain_requests(), LONG], guided_requests()])


@pytest.fixture(scope="module")
def cases(all_cases):
  """Returns cases of one stream and of two streams, which use two buckets."""
  return [case for case in all_cases if case[0] is not LONG]


@pytest.fixture(scope="module")
def long_case(all_cases):
  return next(case for case in all_cases if case[0] is LONG)


def is_case(update, case) -> bool:
  """Returns whether the tokens of an update are the expected tokens so far, or all if finished."""
  expected, count = case[3], len(update.result.tokens)
  return np.array_equal(update.result.tokens, expected.tokens[: None if update.finished else count])


def check(update, case):
  assert is_case(update, case)
  expected = case[3]
  known = expected.log_probs[: len(update.result.tokens)]
  np.testing.assert_allclose(update.result.log_probs, known, atol=ROUNDING[len(case[0].streams)])
  assert update.finished == (len(update.result.tokens) == len(expected.tokens))
  if update.finished and expected.divergence is not None:
    np.testing.assert_allclose(update.result.divergence, expected.divergence, rtol=1e-4)


def run(engine, cases, rng, removed=0.1, check=check):
  """Admits cases at random times and removes some; returns the number of finished cases."""
  waiting, running, finished = [cases[i] for i in rng.permutation(len(cases))], {}, 0
  while waiting or engine.active:
    for case in [c for c in waiting if rng.random() < 0.4 and engine.can_admit(c[0], c[2])]:
      if engine.can_admit(case[0], case[2]):
        running[engine.admit(*case[:3])] = case
        waiting = [c for c in waiting if c is not case]
    for ticket in [t for t in running if rng.random() < removed]:
      engine.remove(ticket)
      del running[ticket]
    for update in engine.step():
      check(update, running[update.ticket])
      if update.finished:
        del running[update.ticket]
        finished += 1
  assert not running
  return finished


def test_a_removed_sample_frees_its_slot_at_once(generator, cases):
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  one, two, three, four, *_ = (case for case in cases if len(case[0].streams) == 2)
  first, second = engine.admit(*one[:3]), engine.admit(*two[:3])
  assert not engine.can_admit(three[0], three[2])
  with refused(NoFreeSlot, "slot"):
    engine.admit(*three[:3])
  assert {u.ticket for u in engine.step()} == {first, second}
  engine.remove(first)
  engine.remove(first)  # Has no effect: the sample has left the batch.
  third = engine.admit(*three[:3])
  updates = engine.step()
  assert {u.ticket for u in updates} == {second, third}
  engine.remove(third)
  fourth = engine.admit(*four[:3])
  engine.remove(fourth)  # This request never began.
  while engine.active:
    updates = engine.step()
    assert [u.ticket for u in updates] == [second]
    check(updates[0], two)
  assert engine.step() == []


def run_often(engine, cases):
  finished = [run(engine, cases, np.random.default_rng(seed)) for seed in range(5)]
  assert all(len(cases) / 3 < n < len(cases) for n in finished)  # Some samples were removed.
  assert run(engine, cases, np.random.default_rng(5), removed=0) == len(cases)


def test_any_schedule_gives_the_samples_of_generate(generator, cases):
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  run_often(engine, cases)
  # The ring buffers wrapped around more than once, so samples started at every entry.
  assert len(engine._batches) == 2


@pytest.mark.slow
def test_shared_key_heads_give_the_samples_of_repeated_heads():
  """Compares a running batch, and `generate`, with a model that repeats key heads, all in int8."""
  model = model_config("modern", num_kv_heads=2)
  repeated = dataclasses.replace(model, num_kv_heads=0)
  params = random_params(model)

  def generator(model, params):
    dtypes = {"weight_dtype": "int8", "cache_dtype": "int8", "image_head": False}
    config = GeneratorConfig(model, VOCAB, IMAGE, POSITIONS, MIXTURE, batch_size=2, **dtypes)
    return Generator(params, config)

  cases = cases_of(
    generator(repeated, with_repeated_heads(params)), [guided_requests()[:2]], SAMPLINGS[:1]
  )
  shared = generator(model, params)
  engine = ContinuousGenerator(shared, slots=2, chunk=3)
  assert run(engine, cases, np.random.default_rng(0), removed=0) == len(cases)
  for case, other in zip(cases, cases_of(shared, [guided_requests()[:2]], SAMPLINGS[:1])):
    np.testing.assert_array_equal(other[3].tokens, case[3].tokens)


def seeds_of_other_slots(monkeypatch):
  plain = state_lib.steps

  def steps(params, control, *args, **static):
    return plain(params, control._replace(seeds=control.seeds[::-1]), *args, **static)

  monkeypatch.setattr(state_lib, "steps", steps)


def compiled_again(generator, *names):
  """Returns a copy of the generator without the compiled programs of these names."""
  programs = Programs(generator.programs.mesh)
  of_before = generator.programs.compiled.items()
  programs.compiled = {key: made for key, made in of_before if key[0][0] not in names}
  generator = copy.copy(generator)
  generator.programs = programs
  return generator


def test_a_broken_batch_is_found(generator, cases, monkeypatch):
  """Negative control: given a bug in the program, some samples differ."""
  seeds_of_other_slots(monkeypatch)
  broken = compiled_again(generator, "running batch")
  plain, same = [case for case in cases if len(case[0].streams) == 1], []
  run(
    ContinuousGenerator(broken, slots=2, chunk=3),
    plain,
    np.random.default_rng(0),
    check=lambda update, case: same.append(is_case(update, case)),
  )
  assert not all(same)


def few_at_once(generator, cases, **options):
  """Decodes one-stream cases in a batch of eight slots, mostly one or two at a time."""
  plain = [case for case in cases if len(case[0].streams) == 1]
  engine, used = ContinuousGenerator(generator, slots=8, chunk=3), []
  waiting, running, rng = list(plain), {}, np.random.default_rng(0)
  while waiting or engine.active:
    count = 3 if len(waiting) == 3 else int(len(running) < 2 and rng.random() < 0.5)
    for case in waiting[:count]:
      running[engine.admit(*case[:3])] = case
    del waiting[:count]
    for update in engine.step():
      used.append(engine._batches[0]._program() is engine._batches[0].program_of_few)
      options.get("check", check)(update, running[update.ticket])
      if update.finished:
        del running[update.ticket]
  return used


@pytest.mark.slow
def test_few_samples_are_made_by_the_steps_of_the_first_slots(generator, cases):
  """Decoding switches from steps of only the first slots to steps of all slots, and back."""
  used = few_at_once(generator, cases)
  assert set(used) == {True, False}
  assert used.index(False) < len(used) - used[::-1].index(True)


def test_a_short_request_is_admitted_to_an_active_batch_of_longer_ones(generator, cases, long_case):
  short = [case for case in cases if len(case[0].streams) == 1][:3]
  long = long_case
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  tickets = {engine.admit(*case[:3]): case for case in (long, *short)}
  # The batch of the long request admits one short request and is full; the rest need another batch.
  assert [batch.bucket.static.widths for batch in engine._batches] == [(64,), (32,)]
  while engine.active:
    for update in engine.step():
      check(update, tickets[update.ticket])
  # Idle batches admit only requests of their own bucket. A long request does not fit a short batch.
  assert engine.can_admit(long[0], long[2])
  tickets = {engine.admit(*case[:3]): case for case in (*short[:2], long)}
  assert [sum(map(bool, batch.slots)) for batch in engine._batches] in ([1, 2], [2, 1])
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  tickets = {engine.admit(*case[:3]): case for case in (*short[:1], long)}
  assert [batch.bucket.static.widths for batch in engine._batches] == [(32,), (64,)]


def test_batches_take_turns_and_are_bounded(generator, cases, long_case):
  """A request gets a batch in the end, even if others keep all active batches full."""
  engine = ContinuousGenerator(generator, slots=2, chunk=3, buckets=2)
  of = {s: [case for case in cases if len(case[0].streams) == s] for s in (1, 2)}
  other, tickets, chunks = long_case, {}, []
  while not chunks or not engine.can_admit(other[0], other[2]):
    for s in (1, 2):
      while engine.can_admit(of[s][0][0], of[s][0][2]):
        tickets[engine.admit(*of[s][0][:3])] = s
    chunks.append({tickets[update.ticket] for update in engine.step()})
  assert chunks[:3] == [{1}, {2}, {1}]
  assert len(chunks) < 20
  ticket = engine.admit(*other[:3])
  assert len(engine._batches) == 2
  while ticket in engine._places:
    for update in engine.step():
      if update.ticket == ticket:
        check(update, other)


def test_a_chunk_that_fails_loses_its_batch_alone(generator, cases):
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  of = {s: next(case for case in cases if len(case[0].streams) == s) for s in (1, 2)}
  lost, kept = (engine.admit(*of[s][:3]) for s in (1, 2))
  engine.step()
  jax.tree.map(lambda x: x.delete(), engine._places[lost][0].state)
  engine.step()
  with refused(StepFailed, tickets=[lost]):
    engine.step()
  again = engine.admit(*of[1][:3])
  finished = set()
  while engine.active:
    for update in engine.step():
      check(update, of[2 if update.ticket == kept else 1])
      finished |= {update.ticket} if update.finished else set()
  assert finished == {kept, again}


@pytest.mark.slow
def test_slots_on_several_devices(generator, cases):
  with on_mesh(2, 1, 2):
    split = small_generator(sampling=MIXTURE, image_head=False)
    with pytest.raises(UserError, match="slots is 3; it must be a multiple of 2"):
      ContinuousGenerator(split, slots=3)
    engine = ContinuousGenerator(split, slots=4, chunk=3)
  plain = [case for case in cases if len(case[0].streams) == 1]
  assert run(engine, plain, np.random.default_rng(0), removed=0) == len(plain)


def test_a_warm_bucket_compiles_nothing(generator, cases, caplog):
  plain = [case for case in cases if len(case[0].streams) == 1]
  again = compiled_again(generator, "running batch", "admit")
  engine = ContinuousGenerator(again, slots=2, chunk=3)
  with jax.log_compiles():
    bucket = bucket_of(plain[0][0], MIXTURE, again)
    for together in (1, 2):
      engine.warm(bucket, plain[0][0], MIXTURE, together)
    assert "Compiling jit" in caplog.text
    caplog.clear()
    engine.usual.append(bucket)
    assert not engine.active
    assert run(engine, plain, np.random.default_rng(0), removed=0) == len(plain)
    assert "Compiling jit" not in caplog.text


def test_bad_calls(generator):
  long = request_lib.text_to_image(VOCAB, IMAGE, np.full(POSITIONS - 2, A[0]))
  engine = ContinuousGenerator(generator)
  with refused(UserError, "128 tokens"):
    engine.admit(long, 0)
  for seed in (-1, 2**32):
    with refused(UserError, str(seed)):
      engine.admit(guided_requests()[0], seed)
  assert not engine.active
