import hashlib
import json
import runpy
import shutil
import sys

import jax
import pytest

from cm3leon_jax.export import stablehlo
from tests.refusals import check_sentence


@pytest.fixture
def copied(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("*.png"))


def refusal(folder, monkeypatch, capsys, *arguments):
  """Runs the example in this process with arguments that it rejects; returns the last line."""
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, "argv", ["serve_example.py", *arguments])
  monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
  monkeypatch.delitem(sys.modules, "artifacts", raising=False)
  with pytest.raises(SystemExit) as stopped:
    runpy.run_path("serve_example.py", run_name="__main__")
  sys.modules.pop("artifacts", None)
  assert stopped.value.code == 2
  assert not (folder / "image.png").exists()
  printed = capsys.readouterr()
  assert not printed.out
  return printed.err.splitlines()[-1]


@pytest.mark.parametrize("file", ["generate_image.stablehlo", "model.safetensors"])
def test_a_changed_file_is_refused(copied, monkeypatch, capsys, file):
  data = bytearray((copied / file).read_bytes())
  data[-1] ^= 1
  (copied / file).write_bytes(data)
  check_sentence(refusal(copied, monkeypatch, capsys, "red"))


@pytest.mark.parametrize("part", [b"ML\xefR", b"\0\0\0\0"])
def test_a_program_of_a_version_that_jax_cannot_read_is_refused(copied, monkeypatch, capsys, part):
  """The digest is valid, but the version of the serialized function or of its StableHLO is not."""
  file = "generate_image.stablehlo"
  data = (copied / file).read_bytes()
  (copied / file).write_bytes(data.replace(part, b"\xff" * 4))

  path = copied / stablehlo.MANIFEST
  manifest = json.loads(path.read_text())
  manifest["digests"][file] = hashlib.sha256((copied / file).read_bytes()).hexdigest()
  path.write_text(json.dumps(manifest))
  line = refusal(copied, monkeypatch, capsys, "red")
  assert f"error: jax {jax.__version__} cannot read generate_image (" in line
  assert line.endswith(f"): install jax {jax.__version__}, or export again.")


def test_prompts_are_padded_to_few_lengths(folder):
  padded = runpy.run_path(str(folder / "artifacts.py"))["padded"]
  assert padded([[1] * 112, [2]], 16).shape == (2, 128)
