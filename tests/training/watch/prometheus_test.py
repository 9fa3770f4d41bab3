import contextlib
import re
import urllib.request

import pytest

from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.prometheus import Prometheus


@pytest.fixture
def now():
  return [100.0]


@pytest.fixture
def board(now):
  clock = lambda: now[0]  # noqa: E731
  with (
    contextlib.closing(Stopwatch(clock)) as watch,
    contextlib.closing(Prometheus(0, 60, watch, clock)) as board,
  ):
    yield board


def get(board):
  with urllib.request.urlopen(f"http://localhost:{board.port}/metrics", timeout=10) as answer:
    return answer.read().decode()


def values(text):
  return {name: float(x) for name, x in re.findall(r"^(\w+) (\S+)$", text, flags=re.M)}


def test_the_text_by_hand(board, now):
  now[0] += 5.0
  assert values(get(board)) == {
    "cm3leon_steps": 60.0,
    "cm3leon_seconds_since_last_step": 5.0,
  }
  board.scalars(3, {"loss": 2.5, "weight": 8.0, "tokens_per_second": 4_620.0})
  now[0] += 10.0
  board.scalars(3, {"heldout_loss": 3.25, "time": 1e9})
  assert values(get(board)) == {
    "cm3leon_step": 3.0,
    "cm3leon_steps": 60.0,
    "cm3leon_loss": 2.5,
    "cm3leon_heldout_loss": 3.25,
    "cm3leon_tokens_per_second": 4_620.0,
    "cm3leon_goodput_ratio": 0.0,  # 0, because the run has spent all its time on restoring.
    "cm3leon_seconds_since_last_step": 10.0,
  }


def test_a_port_that_is_closed_can_be_taken_again(board):
  with contextlib.closing(Stopwatch()) as watch:
    with pytest.raises(OSError, match="in use"):
      Prometheus(board.port, 60, watch)
    first = Prometheus(0, 60, watch)
    first.close()
    Prometheus(first.port, 60, watch).close()
