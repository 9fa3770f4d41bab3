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


def test_held_out_lines_are_not_compared(tmp_path):
  log = MetricsLog(tmp_path)
  log.write(1, {"loss": 1.0})
  log.write(1, {"heldout_loss": 1.0})
  log = MetricsLog(tmp_path, resumed_at=0)
  log.write(1, {"heldout_loss": 2.0})
  assert (log.replayed, log.identical) == (0, 0)


def test_a_resumed_run_without_lines_to_compare_logs_that_too(tmp_path):
  MetricsLog(tmp_path).write(1, {"loss": 1.0})
  log = MetricsLog(tmp_path, resumed_at=1)
  event = {"step": 1, "event": "resumed", "from_step": 1, "replayed": 0, "identical": 0}
  assert read_json_lines(log.path) == [{"step": 1, "loss": 1.0}, event]


def test_a_new_run_starts_an_empty_log(tmp_path):
  MetricsLog(tmp_path).write(1, {"loss": 1.0})
  assert read_json_lines(MetricsLog(tmp_path).path) == []


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
  assert read_json_lines(path) == [{"step": 1, "loss": 2.0}]
  MetricsLog(tmp_path, resumed_at=1).write(2, {"loss": 1.0})
  assert [line["step"] for line in read_json_lines(path) if "loss" in line] == [1, 2]


def test_losses_survive_the_file_bit_for_bit(tmp_path):
  loss = float.fromhex("0x1.921fb54442d18p+1")
  log = MetricsLog(tmp_path)
  log.write(1, {"loss": loss})
  assert read_json_lines(log.path)[0]["loss"].hex() == loss.hex()


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


def write_log(folder, **options):
  """Logs steps 1 to 6, with a checkpoint of step 4."""
  log = MetricsLog(folder, **options)
  for step in range(1, 7):
    log.write(step, {"loss": 8.0 - step})
    if step == 4:
      log.seal()
      log.flush()
  return log.path


# Change of the log -> (function that makes the change, part of the warning).
CHANGES = {
  "missing": (lambda path: path.unlink(), "is missing"),
  "empty": (lambda path: path.write_bytes(b""), "has 0 bytes, 100 were written"),
  "cut": (lambda path: path.write_bytes(path.read_bytes()[:50]), "has 50 bytes, 100 were written"),
  "a line gone": (lambda path: change(path, lambda x: [x[0], *x[2:]]), "differs from what"),
  "a line twice": (lambda path: change(path, lambda x: [x[0], *x]), "differs from what"),
  "lines swapped": (
    lambda path: change(path, lambda x: [x[1], x[0], *x[2:]]),
    "differs from what was written",
  ),
  "a digit": (
    lambda path: change(path, lambda x: [x[0].replace("7.0", "7.5"), *x[1:]]),
    "differs from what was written",
  ),
}


def change(path, lines):
  path.write_text("\n".join(lines(path.read_text().splitlines())) + "\n")


@pytest.mark.parametrize("digest", ["beside it", "elsewhere", "none"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_log_that_is_not_as_it_was_written_is_named_once(tmp_path, capsys, how, digest):
  """Without a digest, as in earlier versions, only missing lines at the end are noticed."""
  options = {"digest_folder": tmp_path / "other"} if digest == "elsewhere" else {}
  path = write_log(tmp_path, **options)
  assert capsys.readouterr().out == ""
  damage, sentence = CHANGES[how]
  damage(path)
  if digest == "none":
    (tmp_path / metrics.DIGEST).unlink()
    kept = how not in ("missing", "empty", "cut")
    sentence = (
      "an earlier version" if kept else "ends with step 2" if how == "cut" else "is missing"
    )
  MetricsLog(tmp_path, resumed_at=4, **options)
  printed = capsys.readouterr().out
  assert sentence in printed
  assert printed.count(str(path)) == printed.count("\n") == 1
  assert ("warning" in printed) == ("earlier version" not in sentence)
  MetricsLog(tmp_path, resumed_at=4, **options)
  assert capsys.readouterr().out == ""


def test_a_log_as_it_was_written_says_nothing(tmp_path, capsys):
  """Accepts lines after the digest, a log cut off by a kill, and a log after a rollback."""
  path = write_log(tmp_path)
  with path.open("a") as file:
    file.write('{"step": 7, "lo')
  MetricsLog(tmp_path, resumed_at=4).write(5, {"loss": 3.0})
  MetricsLog(tmp_path, resumed_at=4).flush()
  assert metrics.cut_log(tmp_path, 2) == 4
  MetricsLog(tmp_path, resumed_at=2).flush()
  MetricsLog(tmp_path, resumed_at=1, every=10)
  assert capsys.readouterr().out == ""


def test_a_rollback_does_not_make_a_changed_log_right(tmp_path, capsys):
  path = write_log(tmp_path)
  change(path, lambda x: [x[0].replace("7.0", "7.5"), *x[1:]])
  metrics.cut_log(tmp_path, 2)
  MetricsLog(tmp_path, resumed_at=2)
  assert "differs from what was written" in capsys.readouterr().out


def test_a_process_that_does_not_write_says_nothing(tmp_path, capsys):
  write_log(tmp_path).unlink()
  MetricsLog(tmp_path, resumed_at=4, enabled=False)
  assert capsys.readouterr().out == ""
  assert (tmp_path / metrics.DIGEST).exists()


def test_in_a_bucket_a_log_has_a_digest_too(bucket, capsys):
  path = write_log(bucket)
  MetricsLog(bucket, resumed_at=4)
  assert capsys.readouterr().out == ""
  path.unlink()
  MetricsLog(bucket, resumed_at=4)
  assert "is missing" in capsys.readouterr().out
