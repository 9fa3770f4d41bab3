import json
import os

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import finetune
from cm3leon_jax.errors import UserError
from tests.refusals import refused


@pytest.fixture
def started(monkeypatch):
  """Replaces the command of a run. Returns the flags of each call."""
  calls = []
  monkeypatch.setattr(finetune, "_start", lambda flags, shown: calls.append((flags, shown)))
  return calls


def image(value, side=6):
  return np.full((side, side, 3), value, np.uint8)


def test_a_folder_is_named_to_the_command(started, tmp_path, monkeypatch):
  finetune.run(tmp_path, "W", "scenes", minutes=2.5, max_forgetting=0.03, fields={"train.steps": 7})
  [(flags, shown)] = started
  assert flags == [
    "--config=own:2.5", "--workdir=W", "--init_from=scenes", f"--config.raw.source={tmp_path}",
    "--config.train.max_forgetting=0.03", "--config.train.steps=7",
  ]  # fmt: skip
  assert shown
  options = {"min_psnr": 17.5, "tokenizer": "own", "show_progress": False}
  monkeypatch.setenv("HOME", str(tmp_path))
  finetune.run("~/", "~/W", "scenes", **options)
  flags, shown = started[1]
  assert flags[-2:] == ["--own_image_tokenizer", "--min_psnr=17.5"]
  assert {f"--workdir={tmp_path}/W", f"--config.raw.source={tmp_path}/"} <= {*flags}
  assert not shown
  with refused(UserError, "epochs", "minutes"):
    finetune.run(tmp_path, "W", "scenes", epochs=3)
  with refused(UserError, "did you mean 'minutes'?"):
    finetune.run(tmp_path, "W", "scenes", minute=3)


def test_pairs_are_written_once_as_a_folder(started, tmp_path):
  Image.fromarray(image(9)).save(tmp_path / "a.png")
  gray = Image.new("L", (4, 4))
  pairs = [(str(tmp_path / "a.png"), "nine", "digit"), (image(3), "three"), (gray, "none")]
  for _ in range(2):
    finetune.run(pairs, tmp_path / "W", "scenes")
  folder = tmp_path / "W" / finetune.GIVEN
  lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
  assert [line["caption"] for line in lines] == ["nine", "three", "none"]
  assert [line.get("concept") for line in lines] == ["digit", None, None]
  pixels = []
  for line in lines:
    with Image.open(folder / line["image"]) as opened:
      pixels.append(np.asarray(opened))
  np.testing.assert_array_equal(pixels[0], image(9))
  np.testing.assert_array_equal(pixels[1], image(3))
  assert pixels[2].shape == (4, 4, 3)
  assert f"--config.raw.source={folder}" in started[1][0]
  with refused(UserError, str(folder), "another call"):
    finetune.run(pairs[:2], tmp_path / "W", "scenes")


def test_the_paths_of_pairs_have_the_limits_of_all_images(started, tmp_path):
  """Regression: a FIFO hung, an EPS file started Ghostscript, and all PNGs were in memory."""
  os.mkfifo(tmp_path / "fifo.png")
  Image.new("RGB", (2, 2)).save(tmp_path / "x.eps")
  Image.new("1", (6_000, 6_000)).save(tmp_path / "large.png")
  for name, fact in {"fifo.png": "not a file", "x.eps": "PNG", "large.png": "36,000,000"}.items():
    with refused(UserError, "pair 1", name, fact):
      finetune.run([(image(3), "three"), (tmp_path / name, "")], tmp_path / "W", "scenes")
  assert [path.name for path in (tmp_path / "W" / finetune.GIVEN).iterdir()] == ["000000.png"]
  with refused(UserError, "no pairs"):
    finetune.run([], tmp_path / "W", "scenes")
  with refused(UserError, "minutes='ten'"):
    finetune.run(tmp_path, tmp_path / "W", "scenes", minutes="ten")
  assert not started


@pytest.mark.parametrize(("last", "fact"), [("error: no such base", "no such base"), ("4 s", "9")])
def test_the_error_of_a_command_is_raised(tmp_path, monkeypatch, last, fact):
  program = tmp_path / "python"
  program.write_text(f"#!/bin/sh\necho '[5/10] train'\necho '{last}'\nexit 9\n")
  program.chmod(0o755)
  monkeypatch.setattr(finetune.sys, "executable", str(program))
  with refused(UserError, fact):
    finetune.run(tmp_path, tmp_path / "W", "scenes", show_progress=False)
