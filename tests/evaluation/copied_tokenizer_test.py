import dataclasses

from etils import epath
import numpy as np
from PIL import Image, ImageFilter
import pytest

from cm3leon_jax.commands.shared_flags import Limits
from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import copied_tokenizer
from cm3leon_jax.evaluation.metrics.reconstructions import compare
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages
from examples.scenes import drawings
from examples.scenes.options import COLORS as PALETTE
from examples.scenes.options import COMMON
from tests.generation.run import SETTINGS, make_run
from tests.refusals import refused

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
  return root


def settings_of(workdir):
  instructions = InstructionsConfig(own_tasks=(TASK,), root=str(workdir.parent / "given"))
  return dataclasses.replace(SETTINGS, instructions=instructions)


def test_images_that_a_copied_tokenizer_reconstructs_badly_are_refused_with_a_sheet(
  workdir, capsys
):
  settings = settings_of(workdir)
  for limits in ((50.0, 0.0), (0.0, 0.1)):
    with refused(UserError, "--own_image_tokenizer", "--min_psnr = ", "--max_color_difference = "):
      copied_tokenizer.check_records(settings, workdir, [TASK], limits)
  with Image.open(workdir / "instructions" / copied_tokenizer.SHEET) as sheet:
    assert sheet.width > 8 * 8
  copied_tokenizer.check_records(settings, workdir, [TASK], (0.0, 0.0))
  said = "reconstructions: the image tokenizer of scenes reconstructs 16 of your images with "
  assert said in capsys.readouterr().out


def test_a_tokenizer_that_was_trained_here_is_not_checked(workdir, capsys):
  write_json(workdir / "vqgan" / stages.DONE, {"id": "v", "summary": {}})
  copied_tokenizer.check_records(settings_of(workdir), workdir, [TASK], (50.0, 0.0))
  assert capsys.readouterr().out == ""


def test_the_images_are_spread_over_a_sorted_file_and_each_counts_once(workdir, monkeypatch):
  lines = [
    f'{{"texts": {{"answer": "red"}}, "images": {{"image": "{i % 20}.png"}}}}' for i in range(60)
  ]
  (workdir.parent / "given" / "train.jsonl").write_text("\n".join(sorted(lines)))
  checked = []
  monkeypatch.setattr(copied_tokenizer, "_check", lambda *values: checked.append(values[3]))
  copied_tokenizer.check_records(settings_of(workdir), workdir, [TASK], (0.0, 0.0))
  [images] = checked
  names = [epath.Path(image).name for image in images]
  assert len(names) == len(set(names)) >= 8
  every = sorted(f"{i}.png" for i in range(20))
  places = [every.index(name) for name in names]
  assert np.diff([-1, *places, 20]).max() <= 3


def test_a_tokenizer_of_the_package_is_shown_and_has_no_limit(workdir, capsys):
  settings = settings_of(workdir)
  vqgan = dataclasses.replace(settings.vqgan, source="pictures")
  settings = dataclasses.replace(settings, vqgan=vqgan)
  copied_tokenizer.check_records(settings, workdir, [TASK], (50.0, 0.1))
  assert capsys.readouterr().out.startswith("reconstructions: the image tokenizer of scenes ")
  assert (workdir / "instructions" / copied_tokenizer.SHEET).exists()


def icons(color):
  images = np.full((16, 48, 48, 3), 255, np.uint8)
  for i, icon in enumerate(list(COMMON.values())[:16]):
    alpha = drawings.ink(icon)[..., None] / 255
    images[i, 12 * (i % 3) : 12 * (i % 3) + 24, 24:] = np.rint(
      255 + alpha * (np.array(color) - 255)
    )
  return images


def blurred(images):
  sharp = [Image.fromarray(image) for image in images]
  return np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(0.5))) for image in sharp])


def in_palette(images):
  """Paints each pixel in the nearest of the eight colors of `scenes`, or white."""
  colors = np.array([*PALETTE.values(), (255, 255, 255)])
  distances = np.linalg.norm(images[..., None, :] - colors.astype(np.float32), axis=-1)
  return colors[distances.argmin(-1)].astype(np.uint8)


BROWN, GRAY, PINK, NAVY = (139, 69, 19), (128, 128, 128), (255, 192, 203), (0, 0, 90)


@pytest.mark.parametrize("color", [(220, 0, 30), (0, 0, 0), BROWN, GRAY, PINK, NAVY])
def test_blurred_icons_pass_the_limits_and_icons_in_other_colors_do_not(color):
  images = icons(color)
  least, most = Limits().limits
  psnr, difference = np.mean([compare(*pair) for pair in zip(images, blurred(images))], 0)
  assert psnr >= least
  assert difference <= most
  psnr, difference = np.mean([compare(*pair) for pair in zip(images, in_palette(images))], 0)
  assert (psnr < least or difference > most) == (color in (BROWN, GRAY, PINK, NAVY))
