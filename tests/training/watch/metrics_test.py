import json

from etils import epath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.watch import metrics
from cm3leon_jax.training.watch.metrics import MetricsLog


def test_a_resumed_run_replaces_later_lines_and_compares_their_losses(tmp_path):
  log = MetricsLog(tmp_path)
  for step, loss in ((1, 3.5), (2, 3.0), (3, 2.5)):
    log.write(step, {"loss": loss})
  log = MetricsLog(tmp_path, resumed_at=1)
  log.write(2, {"loss": 3.0})
  log.write(3, {"loss": 2.5000000000000004})  # The next larger float64.
  log.write(4, {"loss": 2.0})
  lines = read_json_lines(log.path)
  assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
  assert [line for line in lines if "event" in line] == [
    {"step": 3, "event": "resumed", "from_step": 1, "replayed": 2, "identical": 1}
  ]


def test_a_resumed_run_without_lines_to_compare_logs_that_too(tmp_path):
  MetricsLog(tmp_path).write(1, {"loss": 1.0})
  log = MetricsLog(tmp_path, resumed_at=1)
  event = {"step": 1, "event": "resumed", "from_step": 1, "replayed": 0, "identical": 0}
  assert read_json_lines(log.path) == [{"step": 1, "loss": 1.0}, event]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
  assert read_json_lines(path) == [{"step": 1, "loss": 2.0}]
  MetricsLog(tmp_path, resumed_at=1).write(2, {"loss": 1.0})
  assert [line["step"] for line in read_json_lines(path) if "loss" in line] == [1, 2]


def test_processes_that_do_not_write_leave_the_file_alone(tmp_path):
  first = MetricsLog(tmp_path)
  first.write(1, {"loss": 1.0})
  log = MetricsLog(tmp_path, enabled=False)
  log.write(2, {"loss": 2.0})
  log.flush()
  assert read_json_lines(first.path) == [{"step": 1, "loss": 1.0}]
  assert log.before == []


class Bucket(MemoryFileSystem):
  """Fake GCS bucket: objects can be read, replaced, renamed and deleted, but not appended to."""

  def _open(self, path, mode="rb", **kwargs):
    if "a" in mode:
      raise NotImplementedError("objects cannot be appended to")
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
  monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: Bucket())
  yield epath.Path("gs://bucket/metrics")
  Bucket.store.clear()


def test_in_a_bucket_the_file_is_written_anew(bucket, monkeypatch):
  with pytest.raises(NotImplementedError):
    (bucket / "file").open("a").close()
  now = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  log = MetricsLog(bucket)
  log.write(1, {"loss": 3.0})
  log.write(2, {"loss": 2.0})
  assert read_json_lines(log.path) == []
  log.flush()
  assert [line["step"] for line in read_json_lines(log.path)] == [1, 2]
  now[0] = metrics.BUCKET_SECONDS + 1
  log.write(3, {"loss": 1.0})
  assert [line["step"] for line in read_json_lines(log.path)] == [1, 2, 3]
  log = MetricsLog(bucket, resumed_at=2)
  log.write(3, {"loss": 1.0})
  log.flush()
  assert [line["step"] for line in read_json_lines(log.path) if "loss" in line] == [1, 2, 3]
  assert (log.replayed, log.identical) == (1, 1)
