"""Defines fakes of the objects that training hooks use; the fakes record calls."""

import contextlib

from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.watch.monitor import Monitor
from cm3leon_jax.weights.checkpoint import Checkpoints


class FakeState(TrainState):
  """Fake training state, with names in place of parameters."""

  eval_params = "average"

  def __init__(self, step=0, params="params"):
    self.step, self.params = step, params


class FakeStop(StopSignal):
  """Fake stop signal that was received and means exit code `code`; None: not received."""

  def __init__(self, code=None):
    self.code = code


class FakeMonitor(Monitor):
  """Records calls in `events`. `skipped` is the number of consecutive skipped steps."""

  def __init__(self, skipped=0, logged=()):
    self.events, self.skipped, self.logged = [], skipped, dict(logged)

  @contextlib.contextmanager
  def phase(self, name, step):
    self.events.append(f"{name} {step}")
    yield
    self.events.append("end")

  def heldout(self, step, losses):
    self.events.append((step, losses))

  def logged_heldout(self, step):
    return self.logged.get(step, {})

  def samples(self, step, sheet):
    self.events.append((step, sheet))

  def skipped_in_a_row(self):
    return self.skipped


class FakeCheckpoints(Checkpoints):
  """Records saves. `failure` is the error of the save in progress, or None."""

  def __init__(self, failure=None):
    self.saves, self.closed, self.failure = [], False, failure

  def save(self, state, step, next_row, heldout_loss=None, best=None):
    self.saves.append((step, next_row, heldout_loss))

  def check_save(self):
    if self.failure:
      raise self.failure

  def close(self):
    self.closed = True


class Noting(Hook):
  """Hook that records its calls and stops the run after a given step."""

  def __init__(self, name, events, stop_after=None):
    self.name, self.events, self.stop_after = name, events, stop_after
    self.newest = 0

  def begin(self, state):
    self.events.append((self.name, "begin", state))

  def before(self, step):
    self.events.append((self.name, "before", step))

  def ready(self, step):
    self.events.append((self.name, "ready", step))

  def after(self, step, state, metrics):
    self.newest = step
    self.events.append((self.name, "after", step, state, metrics))

  def stops(self):
    return self.newest == self.stop_after

  def end(self, state):
    self.events.append((self.name, "end", state))
