"""Tests `vqgan.source`, with the tokenizer that the package contains."""

import dataclasses
import importlib.resources
import pathlib

import jax
import numpy as np
import pytest

from cm3leon_jax.commands import train_vqgan as command
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run import copies, initial
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers import published_files
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.image_models import vqgan_measures, vqgan_training
from tests.data.raw_folder import write_raw
from tests.generation.run import make_config, one_device
from tests.refusals import refused

FOLDER = pathlib.Path(str(importlib.resources.files("cm3leon_jax")), "assets", "tokenizers")
CODES = read_json(FOLDER / "pictures" / "config.json")["num_codes"]


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(command.common, "use_mesh", lambda settings: one_device())
    yield


def make_settings(codes=CODES, **fields):
  config = make_config()
  config.vocab.image_size = codes
  config.model.vocab_size = config.vocab.text_size + codes
  config.vqgan.update(resolution=16, downsample=4, stem=4, source="pictures", batch_size=8)
  config.vqgan.update({"steps": 80, **fields})
  config.train.tensorboard = False
  return settings_from_config(config)


def installed(side):
  vqgan = make_settings(resolution=side).vqgan
  return published_files.read_installed("pictures", CODES, vqgan).in_batches(24)


def prepare(root, images):
  pairs = [
    {"key": f"k{i}", "caption": "an image", "split": "heldout" if i % 2 else "train"}
    for i in range(len(images))
  ]
  write_raw(root / "raw", pairs, images)
  described = stages.describe_files(root / "raw", table.STAGES["raw"].files)
  write_json(root / "raw" / stages.DONE, {"id": stages.id_of(described), "files": described})


def bars(count=24):
  """Returns images with a colored bar on white."""
  images = np.full((count, 16, 16, 3), 255, np.uint8)
  colors = np.random.default_rng(0).integers(0, 200, (count, 3))
  for i, color in enumerate(colors):
    images[i, :, 4 * (i % 3) : 4 * (i % 3) + 8] = color
  return images


def noise(count=24):
  """Returns images of three squares of noise that the tokenizer did not see."""
  rng = np.random.default_rng(0)
  squares = rng.choice(np.uint8([0, 255]), (3, 4, 4, 3))
  found = squares[rng.integers(0, 3, (count, 4, 4))]
  return np.ascontiguousarray(found.transpose(0, 1, 3, 2, 4, 5).reshape(count, 16, 16, 3))


def test_known_images_need_no_training(tmp_path, capsys):
  prepare(tmp_path, bars())
  command.main(make_settings(), tmp_path)
  out = capsys.readouterr().out
  assert out.startswith("reconstructions: the image tokenizer pictures reconstructs held-out ")
  assert "dB, so nothing is trained.\n" in out
  made, expected = ImageTokenizer.load(tmp_path / "vqgan"), installed(16)
  assert made.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, made.params, expected.params)
  assert read_json(tmp_path / "vqgan" / stages.DONE)["summary"]["steps"] == 0
  assert initial.other_tokenizers("scenes", tmp_path) == []  # Its file has 16-bit numbers.
  command.main(make_settings(), tmp_path)
  assert capsys.readouterr().out == f"{tmp_path / 'vqgan'}: finished already, skipped.\n"


def test_of_unknown_images_only_the_decoder_learns(tmp_path, capsys):
  images = noise()
  prepare(tmp_path, images)
  command.main(make_settings(), tmp_path)
  out = capsys.readouterr().out
  assert "dB, fewer than 20, so its decoder is trained on for 20 steps, and its codes stay; " in out
  made, before = ImageTokenizer.load(tmp_path / "vqgan"), installed(16)
  for part in ("encoder", "codebook"):
    pairs = zip(*(jax.tree.leaves(x.params.get(part, {})) for x in (made, before)))
    assert all(np.array_equal(a, b) for a, b in pairs)
  with one_device():  # As in the command, whose programs are used again.
    codes = before.encode(images)
    np.testing.assert_array_equal(made.encode(images), codes)
    old, new = (
      vqgan_measures.mean_squared_errors(images, x.decode(codes)).mean() for x in (before, made)
    )
  assert new < 0.95 * old
  assert not np.array_equal(made.params["decoder"]["conv_out"]["kernel"],
                            before.params["decoder"]["conv_out"]["kernel"])  # fmt: skip


def make_base(root, tokenizer, settings):
  """Writes what a tuning reads of a base with this image tokenizer."""
  tokenizer.save(root / "vqgan")
  stored = {"run": table.identity(settings, "train"), "settings": dataclasses.asdict(settings)}
  (root / "train").mkdir()
  write_json(root / "train" / "config.json", stored)


@pytest.mark.parametrize(("images", "side"), [(bars(), 32), (noise(), 16)])
def test_a_run_that_starts_from_a_base_has_its_codes(images, side, tmp_path):
  """Also if the base has other codes than the package, and another resolution than the run."""
  known = installed(16)
  order = np.random.default_rng(1).permutation(CODES)
  table_of = {**known.params["codebook"], "table": known.params["codebook"]["table"][order]}
  base = dataclasses.replace(known, params={**known.params, "codebook": table_of})
  (tmp_path / "base").mkdir()
  make_base(tmp_path / "base", base, make_settings())
  images = images.repeat(side // 16, 1).repeat(side // 16, 2)
  prepare(tmp_path, images)
  (tmp_path / "text_tokenizer").mkdir()
  about = {"summary": {"copied_from": str(tmp_path / "base")}}
  write_json(tmp_path / "text_tokenizer" / stages.DONE, about)
  command.main(make_settings(resolution=side), tmp_path)
  made = ImageTokenizer.load(tmp_path / "vqgan").in_batches(24)
  codes = installed(side).encode(images)
  np.testing.assert_array_equal(order[made.encode(images)], codes)
  assert not np.array_equal(made.encode(images), codes)
  assert initial.other_tokenizers(str(tmp_path / "base"), tmp_path) == []
  known.save(tmp_path / "base" / "vqgan")
  assert initial.other_tokenizers(str(tmp_path / "base"), tmp_path) == ["image tokenizer"]


def test_a_base_with_another_image_tokenizer_is_named(tmp_path):
  base, own = tmp_path / "base", tmp_path / "own"
  for folder in (base, own):
    folder.mkdir()
  make_base(base, installed(16), make_settings(source=""))
  with refused(UserError, f"--init_from is {base}, whose image tokenizer is not", "= pictures"):
    copies.copy_tokenizers(Run(own, make_settings()), str(base))
  assert not list(own.iterdir())


@pytest.mark.slow
def test_a_worse_decoder_is_not_kept(tmp_path, monkeypatch):
  prepare(tmp_path, noise())
  monkeypatch.setattr(vqgan_training, "TUNED_RATE", 1e3)
  command.main(make_settings(), tmp_path)
  made, before = ImageTokenizer.load(tmp_path / "vqgan"), installed(16)
  jax.tree.map(np.testing.assert_array_equal, made.params, before.params)


@pytest.mark.parametrize(
  ("settings", "flags"),
  [
    (make_settings(codes=64), f"--config.vocab.image_size={CODES}"),
    (make_settings(downsample=8, stem=8), "--config.vqgan.downsample=4"),
  ],
)
def test_other_codes_are_refused(settings, flags, tmp_path):
  with refused(UserError, "the image tokenizer has other codes than the config", flags):
    command.main(settings, tmp_path)


def test_codes_and_pixels_do_not_depend_on_the_resolution():
  images = np.repeat(np.repeat(noise(2), 2, 1), 2, 2)  # 32 x 32.
  tiled = np.tile(images, (1, 2, 2, 1))
  small, large, largest = (installed(side).in_batches(2) for side in (32, 64, 128))
  codes = small.encode(images).reshape(2, 8, 8)
  found = large.encode(tiled).reshape(2, 16, 16)
  np.testing.assert_array_equal(found, np.tile(codes, (1, 2, 2)))
  # Far from the edges, pixels are the same, too.
  alone = large.decode(large.encode(tiled))[:, 24:40, 24:40]
  wide = np.tile(images, (1, 4, 4, 1))
  among = largest.decode(largest.encode(wide))[:, 56:72, 56:72]
  np.testing.assert_allclose(alone.astype(int), among, atol=1)


def test_files_are_small_and_state_licenses():
  folder = FOLDER / "pictures"
  assert {path.name for path in folder.iterdir()} == {
    *("params.safetensors", "config.json", "ATTRIBUTION.md")
  }
  assert all(path.stat().st_size <= 4_900_000 for path in folder.iterdir())
  lines = (folder / "ATTRIBUTION.md").read_text().splitlines()
  allowed = ("Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-2.0", "CC0-1.0", "public domain", "OFL-1.1")
  assert len(lines) > 40
  assert all(any(f": {name}, " in line for name in (*allowed, "UFL-1.0")) for line in lines)
