import errno
import os
import pathlib
import types

import jax
import pytest

from cm3leon_jax.commands import common, config_file
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import TryAgain, UserError
from tests.launched import python
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys, threading, time
from absl import flags
from cm3leon_jax.commands import common

class Waiting(threading.Thread):
  def run(self):
    time.sleep(120)

Waiting.__module__ = sys.argv[1]
Waiting(daemon=sys.argv[1] == "none").start()

def main(_):
  if sys.argv[2] == "interrupt":
    raise KeyboardInterrupt
  sys.exit(int(sys.argv[2]))

common.run_app(main, flags.FLAGS)
"""


@pytest.mark.parametrize(
  ("backend", "set_before", "expected"),
  [("tpu", None, "own"), ("cpu", None, None), ("tpu", "/a", "/a")],
)
def test_compiled_programs_are_kept_in_the_workdir_of_an_accelerator(
  tmp_path, monkeypatch, backend, set_before, expected
):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  try:
    jax.config.update("jax_compilation_cache_dir", set_before)
    common.keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir == (
      str(tmp_path / "compilation_cache") if expected == "own" else expected
    )
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_host_of_a_pod_that_trains_alone_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
  settings = settings_from_config(config_file.load("cm3leon_7b"))
  with refused(UserError, "4 hosts", "--distributed"):
    common.use_mesh(settings)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_of_a_disk_is_one_sentence_and_may_be_tried_again(number, capsys):
  with pytest.raises(SystemExit) as end, common._reporting():
    raise OSError(number, os.strerror(number), "run/train/config.json")
  assert end.value.code == TryAgain.exit_code
  printed = capsys.readouterr().err
  assert printed.startswith("error: ")
  assert printed.count("\n") == 1
  assert "run/train/config.json" in printed
  # Errors caused by bugs keep their traceback.
  with pytest.raises(FileNotFoundError), common._reporting():
    raise FileNotFoundError(errno.ENOENT, "no such file", "x")


def test_a_full_disk_without_a_file_is_named_by_its_flags(monkeypatch, capsys):
  given = types.SimpleNamespace(value="w/out")
  monkeypatch.setattr(common, "flags", types.SimpleNamespace(FLAGS={"output": given}))
  with pytest.raises(SystemExit), common._reporting():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert capsys.readouterr().err.endswith("No space left on device: --output=w/out\n")


@pytest.mark.parametrize(
  ("module", "end", "code", "sentence"),
  [
    ("orbax.checkpoint", "75", 75, ""),
    ("none", "3", 3, ""),
    ("other", "interrupt", 130, "error: interrupted by Ctrl-C; finished stages and checkpoints"),
  ],
)
def test_a_command_ends_with_its_code(module, end, code, sentence):
  result = python(SCRIPT, module, end, cwd=ROOT, timeout=60)
  assert result.returncode == code
  assert result.stderr.startswith(sentence)
  assert bool(result.stderr) == bool(sentence)
