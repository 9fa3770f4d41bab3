"""Tests what a training does while its state is restored: it reads and compiles."""

import jax
import pytest

from cm3leon_jax.training import decoder
from cm3leon_jax.training.steps import Steps
from tests.models.tiny import mesh_of
from tests.training.runs import losses, run


def test_the_step_is_compiled_once_while_the_state_is_restored(loader, tmp_path):
  """The first call finds the program of the thread, also with a restored state."""
  compiled = []

  def note(event: str, seconds: float, **about) -> None:
    if event.endswith("backend_compile_duration") and "train_step" in about.get("fun_name", ""):
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    for steps in (2, 4):
      run(tmp_path, loader, (2, 2, 2), fresh=True, steps=steps, checkpoint_every=2)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert len(compiled) == 2
  assert len(losses(tmp_path)) == 4


class Wrong(Steps):
  def compile_train(self, batch, num_sources):
    raise MemoryError


def test_what_fails_in_the_thread_is_raised_where_it_is_needed():
  def unreadable():
    raise OSError("a shard")
    yield

  with jax.set_mesh(mesh_of(1, 1, 1)):
    steps, batches = decoder._ahead(Wrong(*[lambda: None] * 4), unreadable(), 0)
    with pytest.raises(OSError, match="a shard"):
      next(batches)
    steps, batches = decoder._ahead(Wrong(*[lambda: None] * 4), iter([1, 2, 3]), 0)
    assert [*batches] == [1, 2, 3]
    with pytest.raises(MemoryError):
      steps.train()
