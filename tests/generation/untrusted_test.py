"""Tests that untrusted prompt files and calls give a task or a one-sentence message."""

# B rows, V ids.

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.grammar import DONE, Grammar, Part, max_new_tokens, plan_array
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.tasks import Task, has_image
from cm3leon_jax.mesh import shard
from tests.data.stores import IMAGE_TOKENS, VOCAB
from tests.generation.run import one_device
from tests.refusals import refused

# Inputs that caused a traceback in earlier versions.
FOUND = {
  "not UTF-8": b'{"prompt": "caf\xe9"}',
  "a byte that ends no character": b'{"prompt": "a"}\xc3',
  "too many digits": b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}",
  "a large number": b'{"prompt": "a", "top_k": 1180591620717411303424}',
  "a large float": b'{"prompt": "a", "guidance": 1e999}',
  "half a surrogate pair": b'{"prompt": "a \\ud800"}',
  "deep nesting": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
  "a deep box": b'{"task": "infill_image", "box": [[[1]]], "prompt": 3}',
  "no seed": b'{"prompt": "a", "seed": null}',
  "an infinite seed": b'{"prompt": "a", "seed": Infinity}',
  "no object": b"3",
  "an unknown task": b'{"task": "\\u001b[2J"}',
}  # fmt: skip


def made(make):
  """Returns the result of `make`, or None after a UserError whose message is safe to print."""
  error = None
  try:
    return make()
  except UserError as caught:
    error = caught
  assert str(error)
  assert str(error).isprintable()
  return None


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_with_its_line(name, tmp_path):
  path = tmp_path / "my.jsonl"
  path.write_bytes(b'{"prompt": "right"}\n' + FOUND[name] + b"\n")
  with refused(UserError, f"{path}, line 2") as error:
    prompt_file.read(path)
  assert str(error.value).isprintable()


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
  max_leaves=5,
)
NAMES = [*prompt_file.FIELDS, *SamplingConfig.__dataclass_fields__, "x"]
PROMPTS = st.lists(
  st.sampled_from(["<mask>", "<break>", "<image>", " ", "red apple", "\ud800", "\x00", "é"])
).map("".join)
LINES = st.fixed_dictionaries(
  {"task": st.sampled_from([task.name for task in prompt_file.TASKS])},
  optional={
    "prompt": PROMPTS,
    "image": st.sampled_from(["", "a.png", "\0", "a::b.png", "é"]),
    "box": st.lists(st.integers(-1, 9), min_size=4, max_size=4) | JSON,
    "length": st.integers(-1, 300),
    "seed": st.integers(0, 2**40),
    "retrieve": st.integers(-1, 3),
    "method": st.sampled_from(["top_p", "contrastive", "mixture"]),
  },
)


@given(LINES, st.dictionaries(st.sampled_from(NAMES), JSON, max_size=2))
@settings(max_examples=60, deadline=None)
def test_any_line_makes_a_task_or_one_sentence(tmp_path_factory, fields, others):
  path = tmp_path_factory.mktemp("lines", numbered=True) / "my.jsonl"
  path.write_text(json.dumps({**fields, **others}))
  tasks = made(lambda: prompt_file.read(path))
  assert tasks is None or isinstance(tasks[0], Task)


PARTS = 64  # All plans are padded to this length, so that they share a compiled program.
IDS = np.arange(VOCAB.size)


@pytest.fixture(autouse=True)
def mesh():
  with one_device():
    yield


def place(tree):
  return jax.tree.map(lambda x: shard(x, *["batch"] + [None] * (x.ndim - 1)), tree)


GRAMMAR = Grammar(VOCAB, IMAGE_TOKENS)
START = jax.jit(lambda plan: GRAMMAR.start(place(plan)))
LEGAL = jax.jit(lambda plan, state: GRAMMAR.legal(*place((plan, state)), jnp.asarray(IDS)))
ADVANCE = jax.jit(lambda plan, state, token: GRAMMAR.advance(*place((plan, state, token))))


def walk(plan, rng) -> np.ndarray:
  """Draws legal ids at random until a plan ends; returns ids [G]."""
  rows = plan_array([(*plan, *[Part(DONE)] * (PARTS - len(plan)))])
  state, ids = START(rows), []
  while (legal := np.flatnonzero(np.asarray(LEGAL(rows, state))[0])).size:
    ids.append(int(rng.choice(legal)))
    assert len(ids) <= max_new_tokens(plan)
    state = ADVANCE(rows, state, np.array(ids[-1:], np.int32))
  return np.array(ids, np.int32)


@given(fields=LINES, seed=st.integers(0, 2**32 - 1))
@example(
  fields={"task": "infill_text", "prompt": "<mask><break><image><break>a<mask>", "image": "a.png"},
  seed=0,
)
@example(fields={"task": "infill_image", "image": "a.png", "box": [0, 0, 3, 9]}, seed=0)
@example(fields={"task": "interleaved", "length": 1}, seed=0)
@example(fields={"task": "question", "prompt": "{0} {x}", "image": "a.png"}, seed=0)
@settings(max_examples=40, deadline=None)
def test_any_request_ends_and_what_it_generates_is_read(layout, fields, seed):
  """Random legal tokens end within the limit and are readable as the result of any task."""
  fields, rng = dict(fields), np.random.default_rng(seed)
  common = {"sampling": SamplingConfig(method=fields.pop("method", "top_p")), "where": "here"}
  if "seed" in fields:
    common["seed"] = fields.pop("seed")
  box = fields.get("box", ())
  fields["box"] = tuple(box) if isinstance(box, list) else (box,)
  name = fields.pop("task")
  task = made(lambda: prompt_file.make_task(name, fields, **common))
  codes = np.arange(IMAGE_TOKENS) if task and has_image(task) else None
  request = task and made(lambda: task.to_request(layout, codes))
  if request is None:
    return
  assert len(request.plan) < PARTS
  ids = walk(request.plan, rng)
  segments, filled = task.from_ids(layout, request, ids)
  assert segments
  assert all(isinstance(text, str) for text in filled)
