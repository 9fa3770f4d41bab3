import threading

from cm3leon_jax import vocab
from tools import walks


def test_files_are_those_whose_functions_run_in_any_thread():
  with walks.Walk() as walk:
    thread = threading.Thread(target=lambda: vocab.VocabLayout().size)
    thread.start()
    thread.join()
  assert list(walk.files) == ["vocab.py"]


def test_a_record_ends_with_the_first_return_of_a_function():
  with walks.Walk(until=("vocab.py", "size")) as walk:
    layout = vocab.VocabLayout()
    assert (layout.size, layout.unk) == (layout.size, layout.unk)
  assert walk._ended


def test_a_climb_is_a_call_of_a_higher_floor():
  height = walks.floors()
  assert height["errors.py"] == 0
  assert height["files/json_files.py"] < height["data/rows/plan.py"] < height["api.py"]
  walk = walks.Walk()
  walk.pairs = {("files/atomic.py", "data/rows/plan.py"): None, ("api.py", "mesh.py"): None}
  assert walk.climbs() == [("files/atomic.py", "data/rows/plan.py")]
