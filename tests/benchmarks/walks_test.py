import threading

from benchmarks import walks
from cm3leon_jax import vocab
from cm3leon_jax.config import build


def test_files_are_those_whose_functions_run_in_any_thread():
  with walks.Walk() as walk:
    thread = threading.Thread(target=lambda: vocab.VocabLayout().size)
    thread.start()
    thread.join()
  assert list(walk.files) == ["vocab.py"]
  with walks.Walk() as nothing:
    import benchmarks.golden_config  # noqa: F401
  assert not set(nothing.files) - {"config.py"}


def test_a_climb_is_a_call_of_a_room_above():
  with walks.Walk() as walk:
    build(vocab.VocabLayout, {})
  assert set(walk.files) == {"config.py", "vocab.py"}
  assert walk.climbs() == []  # Both modules belong to the same room, the base.
  walk.pairs = {("files/atomic.py", "data/rows/plan.py"): None, ("api.py", "mesh.py"): None}
  assert walk.climbs() == [("files/atomic.py", "data/rows/plan.py")]


def test_rooms_are_in_the_order_of_the_page():
  order = walks.rooms()
  assert order.index("base") < order.index("data") < order.index("decoding") < order.index("api")
  assert walks.room_of("data/rows/plan.py") == "data"
  assert walks.room_of("api.py") == "api"
  for file in ("files/atomic.py", "vocab.py", "clip/config.py"):
    assert walks.room_of(file) == "base"
