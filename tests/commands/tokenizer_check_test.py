import dataclasses

from absl import flags
from absl.testing import flagsaver
from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.commands import tokenizer_check
from cm3leon_jax.config import UserError
from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask
from cm3leon_jax.evaluation.metrics.reconstructions import compare
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run import stages
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from examples.scenes import drawings
from examples.scenes.options import COMMON
from tests.api_test import ROOT
from tests.generation.run import SETTINGS, make_run
from tests.refusals import refused

LIMITS = ("min_psnr", "max_color_difference")
TASK = InstructionTask(
  name="color", templates=("{answer} <break> {image}",), target="answer", format="jsonl"
)


@pytest.fixture
def workdir(tmp_path):
  """Makes a run whose image tokenizer, with random weights, was copied; and 20 images."""
  root = epath.Path(tmp_path / "run")
  make_run(root)
  write_json(root / "vqgan" / stages.DONE, {"id": "v", "summary": {"copied_from": "scenes"}})
  folder = tmp_path / "given"
  folder.mkdir()
  rng = np.random.default_rng(0)
  lines = []
  for i in range(20):
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / f"{i}.png")
    lines.append(f'{{"texts": {{"answer": "red"}}, "images": {{"image": "{i}.png"}}}}')
  (folder / "train.jsonl").write_text("\n".join(lines))
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return root


def settings_of(workdir):
  instructions = InstructionsConfig(own_tasks=(TASK,), root=str(workdir.parent / "given"))
  return dataclasses.replace(SETTINGS, instructions=instructions)


def test_images_that_a_copied_tokenizer_reconstructs_badly_are_refused_with_a_sheet(
  workdir, capsys
):
  settings = settings_of(workdir)
  for limits in ({"min_psnr": 50.0, LIMITS[1]: 0.0}, {"min_psnr": 0.0, LIMITS[1]: 0.1}):
    with (
      flagsaver.flagsaver(**limits),
      refused(UserError, "--own_image_tokenizer", *(f"--{name} = " for name in LIMITS)),
    ):
      tokenizer_check.of_records(settings, workdir, [TASK])
  with Image.open(workdir / "instructions" / tokenizer_check.SHEET) as sheet:
    assert sheet.width > 8 * 8
  with flagsaver.flagsaver(min_psnr=0.0, max_color_difference=0.0):
    tokenizer_check.of_records(settings, workdir, [TASK])
  said = "reconstructions: the image tokenizer of scenes reconstructs 16 of your images with "
  assert said in capsys.readouterr().out


def test_a_tokenizer_that_was_trained_here_is_not_checked(workdir, capsys):
  write_json(workdir / "vqgan" / stages.DONE, {"id": "v", "summary": {}})
  with flagsaver.flagsaver(min_psnr=50.0):
    tokenizer_check.of_records(settings_of(workdir), workdir, [TASK])
  assert capsys.readouterr().out == ""


def test_the_images_are_spread_over_a_sorted_file_and_each_counts_once(workdir, monkeypatch):
  lines = [
    f'{{"texts": {{"answer": "red"}}, "images": {{"image": "{i % 20}.png"}}}}' for i in range(60)
  ]
  (workdir.parent / "given" / "train.jsonl").write_text("\n".join(sorted(lines)))
  checked = []
  monkeypatch.setattr(tokenizer_check, "_check", lambda *values: checked.append(values[3]))
  tokenizer_check.of_records(settings_of(workdir), workdir, [TASK])
  [images] = checked
  names = [epath.Path(image).name for image in images]
  assert len(names) == len(set(names)) >= 8
  every = sorted(f"{i}.png" for i in range(20))
  places = [every.index(name) for name in names]
  assert np.diff([-1, *places, 20]).max() <= 3


COLORS = [
  *((color, True) for color in ((220, 0, 30), (255, 130, 0), (0, 50, 230), (0, 0, 0))),
  ((139, 69, 19), False), ((128, 128, 128), False), ((255, 192, 203), False),
  ((173, 216, 230), False), ((128, 128, 0), False), ((0, 0, 128), False),
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes_tokenizer():
  return ImageTokenizer.load(ROOT / "cm3leon_jax/assets/models/scenes/vqgan")


@pytest.mark.parametrize(("color", "passes"), COLORS)
def test_icons_pass_in_the_colors_of_the_tokenizer_alone(color, passes, scenes_tokenizer):
  images = np.full((16, 48, 48, 3), 255, np.uint8)
  for i, icon in enumerate(list(COMMON.values())[:16]):
    alpha = drawings.ink(icon)[..., None] / 255
    images[i, 12 * (i % 3) : 12 * (i % 3) + 24, 24:] = np.rint(
      255 + alpha * (np.array(color) - 255)
    )
  made = scenes_tokenizer.decode(scenes_tokenizer.encode(images))
  psnr, difference = np.mean([compare(*pair) for pair in zip(images, made)], 0)
  least, most = (limit.default for limit in tokenizer_check.LIMITS)
  assert (psnr >= least and difference <= most) == passes
  assert (difference <= most) == passes
