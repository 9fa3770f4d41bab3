import os
import signal

import jax
import pytest

from cm3leon_jax.errors import CTRL_C, INTERRUPTED
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.weights import checkpoint
from tests.training.runs import losses, run


def test_the_hook_stops_after_the_step_in_which_a_signal_came():
  with StopSignal(jax.make_mesh((1,), ("data",))) as stop:
    stop.after(1, None, {})
    assert (stop.code, stop.stops()) == (None, False)
    os.kill(os.getpid(), signal.SIGTERM)
    # The value changes only after the step, so that all hooks of a step see the same value.
    assert not stop.stops()
    stop.after(2, None, {})
    assert (stop.code, stop.stops()) == (INTERRUPTED, True)


def test_ctrl_c_saves_and_the_same_call_continues(whole, loader, tmp_path, capfd):
  def interrupt(_, step):
    if step == 3:
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(SystemExit) as stop:
    run(tmp_path, loader, sample_grid=interrupt, sample_every=1)
  assert stop.value.code == CTRL_C
  out, err = capfd.readouterr()
  assert "stopped at step 4 of 12; saved in " in out
  assert "Ctrl-C: the run saves after this step; once more stops it at once." in err
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_loses_no_save(whole, loader, tmp_path):
  def interrupt(_, step):
    if step == 5:  # The save of step 4 may be in progress.
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, loader, sample_grid=interrupt, sample_every=1)
  assert checkpoint.Checkpoints(tmp_path, 2).newest() == 4
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])
