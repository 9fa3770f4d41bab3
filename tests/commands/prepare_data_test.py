import json

from PIL import Image
import pytest

from cm3leon_jax.commands import prepare_data
from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import from_data
from examples.scenes.judge.leaks import leaks
from tests.data.checks.leaks_test import photos, write_source
from tests.launched import ROOT, SCENES, launch
from tests.refusals import check_refused, refused


def command(*flags, config="ml_configs/defaults.py"):
  small = ("--config.train.global_batch_size=1", "--config.data.sequence_length=512")
  pairs_only = "--config.data.text_share=0.0"
  return launch("prepare_data", f"--config={config}", pairs_only, *small, *flags)


def check_enough(summary, tasks="", **data):
  config = default_config()
  config.data.update(data)
  config.instructions.tasks = tasks
  prepare_data.check_enough(settings_from_config(config), summary)


PAIRS = {
  "train_pairs": 9, "heldout_pairs": 2, "heldout_concepts": 2, "train_caption_characters": 180,
}  # fmt: skip
TEXTS = {"train_texts": 5, "heldout_texts": 1}


def test_data_that_the_config_needs_is_enough():
  check_enough(PAIRS, text_share=0.0)
  check_enough(PAIRS | TEXTS, text_share=0.3)
  check_enough(TEXTS, text_share=1.0)
  check_enough({}, tasks="cm3leon")  # Instruction tuning needs neither pairs nor texts.


@pytest.mark.parametrize(
  ("summary", "data"),
  [
    ({"train_pairs": 20, "train_crops": 15, "heldout_pairs": 0}, {"text_share": 0.0}),
    ({"train_pairs": 20, "train_crops": 15, "heldout_pairs": 1}, {"text_share": 0.0}),
    (PAIRS | {"heldout_concepts": 1}, {"text_share": 0.0}),
  ],
)
def test_data_that_a_later_stage_would_refuse_is_refused(summary, data):
  with refused(UserError, "concepts", "heldout_fraction"):
    check_enough(summary, **data)


def test_pairs_that_are_too_few_for_any_fraction_are_to_be_added():
  with refused(UserError, "has 2 pairs", "at least 3", "add pairs") as error:
    check_enough({"train_pairs": 4, "train_crops": 3, "heldout_pairs": 1}, text_share=0.0)
  assert "heldout_fraction" not in str(error.value)


def test_what_follows_from_the_data_is_counted_printed_and_used_by_later_stages(tmp_path):
  source = tmp_path / "images"
  source.mkdir()
  for i in range(30):
    Image.new("RGB", (40, 60), (8 * i, 100, 100)).save(source / f"{i}.png")
    (source / f"{i}.txt").write_text(f"a plain wall number {i}")
  flags = [f"--workdir={tmp_path / 'run'}", f"--config.raw.source={source}"]
  prepared = command(*flags, "--config.raw.heldout_fraction=0.3", config="own")
  assert prepared.returncode == 0, prepared.stderr
  assert all(f" {name}.resolution 24" in prepared.stdout for name in ("vqgan", "clip"))
  summary = json.loads((tmp_path / "run" / "raw" / "done.json").read_text())["summary"]
  counts = summary[from_data.COUNTS]
  assert (counts["resolution"], counts["pairs"]) == (24, summary["train_pairs"])
  with Image.open(next((tmp_path / "run" / "raw").glob("*/images/*.png"))) as image:
    assert image.size == (24, 24)
  trained = launch("train_text_tokenizer", "--config=own", flags[0])
  assert trained.returncode == 0, trained.stderr
  tokenizer = json.loads((tmp_path / "run" / "text_tokenizer" / "tokenizer.json").read_text())
  assert len(tokenizer["model"]["vocab"]) == counts["text_tokens"]
  (tmp_path / "other").mkdir()
  early = launch("train_text_tokenizer", "--config=own", f"--workdir={tmp_path / 'other'}")
  check_refused(early, "config.clip.batch_size", "prepare_data")


@pytest.mark.parametrize(("source", "workdir"), [("~/in", "~/in/run"), (".", ".")])
def test_a_repeated_command_does_not_read_its_own_output(source, workdir, tmp_path):
  """Regression: with `=`, shells leave "~", which named a folder; and pairs doubled."""
  folder = write_source(tmp_path / "in", photos("train", range(4)) | photos("heldout", [7, 9]))
  flags = f"--config.raw.source={source}", f"--workdir={workdir}", "--config.raw.resolution=48"
  where = {"cwd": folder, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
  for repeats in (False, True):
    result = launch("prepare_data", "--config=own", *flags, **where)
    assert result.returncode == 0, result.stderr
    assert ("left out, because a run wrote it: " in result.stdout) == repeats
    summary = json.loads((done := next(folder.rglob("done.json"))).read_text())["summary"]
    assert (summary["train_pairs"] - summary["train_crops"], summary["heldout_pairs"]) == (4, 2)
    done.unlink()  # As if the command was killed.
  assert not list(folder.rglob("~"))


def test_check_leaks_names_the_pairs_and_fails(tmp_path):
  images = photos("train", range(4)) | photos("heldout", [3, 9])
  source = write_source(tmp_path / "in", images)
  flags = [f"--config.raw.source={source}", "--config.raw.resolution=64", f"--workdir={tmp_path}"]
  unprepared = command(*flags, "--check_leaks")
  check_refused(unprepared, "raw", "prepare_data")
  assert command(*flags).returncode == 0
  checked = command(*flags, "--check_leaks")
  assert checked.returncode == 2
  assert "heldout_images 2, train_images 4, near_pairs 1, leaked_heldout_images 1" in checked.stdout
  assert (
    "near: heldout 'heldout3', train 'train3', PSNR inf dB, hash distance 0.00" in checked.stdout
  )
  assert "error: 1 of 2 held-out images" in checked.stderr


def test_a_function_is_named_by_a_flag_relative_to_the_current_folder_and_pixels_tell_no_leak():
  source = "--config.raw.source=tests/commands/own_records.py:records"
  unset = command(source, "--workdir=w", config="own")
  check_refused(unset, "config.raw.resolution", "config.raw.crops")
  checked = command(source, "--workdir=w", "--check_leaks")
  check_refused(checked, "--check_leaks", f"{ROOT}/tests/commands/own_records.py:records")


def test_leaked_facts_of_scenes_are_found_in_a_prepared_folder(tmp_path):
  fields = {"train": 60, "heldout": 14, "bank": 0, "rare_objects": 20}
  flags = [f"--config.raw.options.{name}={value}" for name, value in fields.items()]
  prepared = command(*flags, f"--workdir={tmp_path}", config=SCENES)
  assert prepared.returncode == 0, prepared.stderr
  assert "train_pairs 60, heldout_pairs 14" in prepared.stdout
  assert leaks(tmp_path / "raw").first == []


def test_texts_without_pairs_are_warned_of_and_refused(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.txt").write_text("A text.")
  flags = [f"--config.raw.source={tmp_path / 'in'}", f"--workdir={tmp_path}"]
  prepared = command(*flags)
  assert prepared.returncode == 2
  assert "train_texts 1, " in prepared.stdout
  assert "warning: 0 pairs, so no image has a caption" in prepared.stdout
  assert "error: the source has 0 pairs, " in prepared.stderr
